"""Tensors as small codes: which codec for what, what stands in a file, and back into numbers.

    rest          what users write (``rest="q8"``) -> a codec for each component of a layer
    stored        codec + tensor -> names, types and shapes of the arrays that hold its codes, and back, checked
    decoding      arrays -> numbers: numpy, the same bits everywhere
    encoding      numbers -> arrays: torch, on the device where the numbers are
    kernels       the same, fused by torch.compile where that works

Codes are against numbers that are known exactly, never against other codes. ``docs/spec/checkpoint-v1.md`` section 7
defines every codec. Importing this brings in neither torch nor numpy.
"""

from .deviation import Deviation
from .rest import MAX_SHARE, MIN_NUMEL, SKIP, Component, Rest, component_of, parse_rest
from .stored import (
    BASE_KEY,
    BLOCK_NUMEL,
    CODES_KEY,
    STATE_BASE_KEY,
    StoredCodes,
    array_name,
    parse_codes,
    record_codes,
)

__all__ = [
    "BASE_KEY",
    "BLOCK_NUMEL",
    "CODES_KEY",
    "MAX_SHARE",
    "MIN_NUMEL",
    "SKIP",
    "STATE_BASE_KEY",
    "Component",
    "Deviation",
    "Rest",
    "StoredCodes",
    "array_name",
    "component_of",
    "parse_codes",
    "parse_rest",
    "record_codes",
]
