"""Tags of a run's checkpoints: names of the user's that ``load_checkpoint`` takes.

The tag of a save lies in its checkpoint. A step is saved once; a tag that comes later, when the best model is that of
a periodic save, goes into a small file beside the checkpoints:

    tags.json    {"checkpoint-400": {"run": <run_id>, "created": <time>, "tags": ["best"]}}

Run and time tell a checkpoint from another of the same step, after training went back and came by again; its digest
would not do, for that changes when it is thinned. A tag leads to the newest checkpoint that has it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import FormatError, NotFoundError, UnsupportedError
from ..storage import checkpoint_name, list_checkpoints
from ..strict_json import parse_object
from ..zero import read_engine_state

__all__ = ["TAGS_NAME", "add_tag", "find_tag"]

TAGS_NAME = "tags.json"
# As DeepSpeed names a save without a tag, and as we name the directory.
_TAG_OF_STEP = re.compile(r"(?:global_step|checkpoint-)(0|[1-9][0-9]*)")


def find_tag(run: Path, tag: str) -> Path:
    """The newest checkpoint that was saved with a tag, or got it later.

    Raises:
        NotFoundError: There is none.
        FormatError: The file of later tags cannot be read.
    """
    entries = [entry for entry in list_checkpoints(run) if entry.has_manifest]
    if (named := _TAG_OF_STEP.fullmatch(tag)) and any(entry.step == int(named[1]) for entry in entries):
        return run / checkpoint_name(int(named[1]))
    later = _read_tags(run)
    for entry in reversed(entries):
        record = later.get(entry.path.name)
        has_it = record is not None and tag in record["tags"] and _is_of(record, open_checkpoint(entry.path))
        if has_it or read_engine_state(entry.path).tag == tag:
            return entry.path
    raise NotFoundError(
        "no checkpoint of the run has this tag",
        kind="missing-checkpoint",
        path=run,
        expected=tag,
        found=", ".join(entry.path.name for entry in entries[-5:]) or "no checkpoints",
        hint="leave tag out to take the newest",
    )


def add_tag(
    path: Path, tag: str | None, client_state: Mapping[str, Any] | None, write: Callable[[str, str], None]
) -> None:
    """Give a checkpoint that is published one more tag.

    Args:
        path: The checkpoint.
        tag: None, its own name and a tag that it has need nothing.
        client_state: What is to be saved with the tag; None is nothing.
        write: Puts a text into a file of the run's directory, durably.

    Raises:
        UnsupportedError: The checkpoint holds another ``client_state``.
        NotFoundError: It is gone.
        FormatError: The file of later tags cannot be read.
        WriteError: It cannot be written.
    """
    checkpoint = open_checkpoint(path)
    state, step = read_engine_state(path), checkpoint.manifest.step
    if client_state is not None and not _is_same(dict(client_state), state.client_state):
        raise UnsupportedError(
            f"step {step} is saved already, with another client_state",
            kind="client-state",
            path=path,
            expected="the client_state of its first save, or None",
            found=f"tag={tag!r}, client_state with {', '.join(map(str, client_state)) or 'nothing'}",
            hint="give both saves of a step the same client_state, or save to another directory",
        )
    if tag is None or tag == state.tag or ((named := _TAG_OF_STEP.fullmatch(tag)) and int(named[1]) == step):
        return
    run = path.parent
    there = {entry.path.name for entry in list_checkpoints(run)}
    records = {name: record for name, record in _read_tags(run).items() if name in there}
    known = records.get(path.name)
    tags = known["tags"] if known is not None and _is_of(known, checkpoint) else []
    if tag not in tags:
        records[path.name] = {
            "run": checkpoint.manifest.run_id,
            "created": checkpoint.manifest.created,
            "tags": [*tags, tag],
        }
        write(TAGS_NAME, json.dumps(records, indent=1) + "\n")


def _is_of(record: Mapping[str, Any], checkpoint: Checkpoint) -> bool:
    return (record["run"], record["created"]) == (checkpoint.manifest.run_id, checkpoint.manifest.created)


def _read_tags(run: Path) -> dict[str, dict[str, Any]]:
    """Name of a checkpoint -> its record; empty if no tag came later."""
    path = run / TAGS_NAME
    if not path.exists():
        return {}
    records = parse_object(path.read_bytes(), what="the tags of checkpoints", path=path)
    for name, record in records.items():
        if (
            not isinstance(record, dict)
            or record.keys() != {"run", "created", "tags"}
            or not isinstance(record["tags"], list)
        ):
            raise FormatError(
                "cannot read the tags of checkpoints",
                kind="bad-tags",
                path=path,
                expected="run, created and tags of each checkpoint",
                found=f"{name}: {record!r:.80}",
                hint="move the file away: the checkpoints are as they were, and load by checkpoint-<step>",
            )
    return records


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values of a ``client_state`` are equal; tensors wherever they are."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        return both and one.dtype == other.dtype and torch.equal(one.detach().cpu(), other.detach().cpu())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return bool(one == other or (one != one and other != other))  # the second: NaN, which equals nothing
