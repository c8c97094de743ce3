"""Checkpoints of our own (``docs/spec/checkpoint-v1.md``), as a source and as a target of a merge."""

from .codes import LayerCodes, check_state_base, read_codes_header, weights_metas
from .packed import check_packed, read_packed, state_metas
from .parts import (
    Kind,
    LayerFile,
    check_names,
    check_part,
    join_files,
    join_notes,
    open_layer_file,
    read_notes,
)
from .planning import plan_tailored
from .reading import layers_of, open_tailored
from .shards import encode_shards

__all__ = [
    "Kind",
    "LayerCodes",
    "LayerFile",
    "check_names",
    "check_packed",
    "check_part",
    "check_state_base",
    "encode_shards",
    "join_files",
    "join_notes",
    "layers_of",
    "open_layer_file",
    "open_tailored",
    "plan_tailored",
    "read_codes_header",
    "read_notes",
    "read_packed",
    "state_metas",
    "weights_metas",
]
