"""Checkpoints of our own (``docs/spec/checkpoint-v1.md``), as a source and as a target of a merge."""

from .codes import LayerCodes, read_codes_header, weights_metas
from .planning import plan_tailored
from .reading import open_tailored, read_manifest

__all__ = ["LayerCodes", "open_tailored", "plan_tailored", "read_codes_header", "read_manifest", "weights_metas"]
