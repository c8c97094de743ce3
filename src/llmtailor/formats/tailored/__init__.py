"""Checkpoints of our own (``docs/spec/checkpoint-v1.md``), as a source and as a target of a merge."""

from .codes import LayerCodes, check_state_base, read_codes_header, weights_metas
from .packed import check_packed, read_packed, state_metas
from .planning import plan_tailored
from .reading import open_tailored, read_manifest

__all__ = [
    "LayerCodes",
    "check_packed",
    "check_state_base",
    "open_tailored",
    "plan_tailored",
    "read_codes_header",
    "read_manifest",
    "read_packed",
    "state_metas",
    "weights_metas",
]
