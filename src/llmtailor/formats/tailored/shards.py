"""Which elements of its tensors a file in parts holds: in its ``__metadata__``, for us and for torch's DCP.

Source: torch 2.13, distributed/checkpoint/_hf_utils.py (``DCP_SHARDING_INFO``: ``{name: {"saved_offsets": [...]}}``),
hf_storage.py (read_metadata: where the key stands, every tensor of the file is in it).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import FormatError
from ...shards import Shard, whole_shard
from ...strict_json import parse_object
from ..safetensors import Header

__all__ = ["DCP_KEY", "SHARDS_KEY", "encode_shards", "read_shards"]

SHARDS_KEY = "llmtailor.shards"
"""JSON: name -> ``{"shape": [...], "offsets": [...]}``; ``"start": n`` instead of offsets for a run of elements."""
DCP_KEY = "DCP_SHARDING_INFO"


def encode_shards(shards: Mapping[str, Shard]) -> dict[str, str]:
    """What the ``__metadata__`` of a file says of its tensors; nothing if all are whole.

    Args:
        shards: Of every tensor of the file, by name.
    """
    # Not ``is_whole``: what a rank holds of a tensor without elements has another shape than that.
    ours = {name: _encode(shard) for name, shard in shards.items() if shard.is_run or shard.sizes != shard.shape}
    if not ours:
        return {}
    dcp = {name: {"saved_offsets": list(shard.offsets)} for name, shard in shards.items()}
    return {SHARDS_KEY: json.dumps(dict(sorted(ours.items()))), DCP_KEY: json.dumps(dict(sorted(dcp.items())))}


def _encode(shard: Shard) -> dict[str, Any]:
    where = {"start": shard.offsets[0]} if shard.is_run else {"offsets": list(shard.offsets)}
    return {"shape": list(shard.shape), **where}


def read_shards(path: Path, header: Header) -> dict[str, Shard]:
    """What each tensor of a file is a part of; the whole of it, if the file does not say.

    Raises:
        FormatError: The file says what cannot be, or one thing to us and another to torch.
    """
    text = header.metadata.get(SHARDS_KEY)
    told = parse_object(text.encode(), what="shards of a file", path=path) if text else {}
    if unknown := sorted(told.keys() - header.tensors.keys()):
        raise _refuse(path, unknown[0], "a tensor of the file", "none of that name")
    shards = {
        name: _decode(path, name, told[name], stored.meta.shape) if name in told else whole_shard(stored.meta.shape)
        for name, stored in header.tensors.items()
    }
    _check_dcp(path, header.metadata.get(DCP_KEY), encode_shards(shards).get(DCP_KEY))
    return shards


def _check_dcp(path: Path, found: str | None, expected: str | None) -> None:
    told, ours = (
        parse_object(text.encode(), what=DCP_KEY, path=path) if text is not None else {} for text in (found, expected)
    )
    for name in sorted(told.keys() | ours.keys()):
        if told.get(name) != ours.get(name):
            raise _refuse(path, name, f"{ours.get(name)} in {DCP_KEY}", told.get(name))


def _decode(path: Path, name: str, told: Any, sizes: tuple[int, ...]) -> Shard:
    expected = '{"shape": [...], "offsets": [...]} or {"shape": [...], "start": n}'
    if not isinstance(told, dict) or told.keys() not in ({"shape", "offsets"}, {"shape", "start"}):
        raise _refuse(path, name, expected, told)
    shape, is_run = told["shape"], "start" in told
    offsets = [told["start"]] if is_run else told["offsets"]
    if not _are_counts(shape) or not _are_counts(offsets):
        raise _refuse(path, name, expected, told)
    try:
        return Shard(shape=tuple(shape), offsets=tuple(offsets), sizes=sizes, is_run=is_run)
    except ValueError as err:
        raise _refuse(path, name, "elements of the tensor", f"{told}, of {list(sizes)}") from err


def _are_counts(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(each) is int and 0 <= each < 2**62 for each in values)
    )


def _refuse(path: Path, name: str, expected: str, found: object) -> FormatError:
    return FormatError(
        "the file says of a tensor that it is a part of what cannot be",
        kind="shards",
        path=path,
        fqn=name,
        expected=expected,
        found=ascii(found)[:200],
    )
