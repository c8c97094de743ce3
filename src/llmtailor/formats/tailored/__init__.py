"""Checkpoints of our own (``docs/spec/checkpoint-v1.md``), as a source and as a target of a merge."""

from .planning import plan_tailored
from .reading import open_tailored, read_manifest

__all__ = ["open_tailored", "plan_tailored", "read_manifest"]
