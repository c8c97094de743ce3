"""What ranks tell each other of a save, and what the coordinator makes of it. Records and pure functions.

vote       of each rank: the files it wrote and linked, and digests of what it believes
judge      all votes -> nothing, or the fault and whose it is
merge      all votes -> the one manifest
verdict    to each rank: published or not, and what it needs to plan its next save
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import FormatError, WriteError
from .manifest import FileRecord, LayerRecord, Manifest, PartRecord, digest_of

__all__ = [
    "Fault",
    "LayerSummary",
    "Verdict",
    "Vote",
    "Whereabouts",
    "apply_verdict",
    "decode_message",
    "digest_choice",
    "digest_schema",
    "encode_message",
    "judge",
    "merge_votes",
    "say_elsewhere",
    "summarize",
    "to_line",
]

# A vote has some 400 bytes a layer before it is packed.
_MAX_MESSAGE_NBYTES = 64 * 2**20
# Of an error of another rank, as much as a person reads.
_MAX_TEXT = 2000


class _Message(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Vote(_Message):
    """What a rank did for a save."""

    rank: Annotated[int, Field(ge=0)]
    step: int
    host: str
    pid: int
    store: str
    """The run's directory as this rank resolves it."""
    choice: str
    """Digest of what was to be written; see ``SavePlan.choice``."""
    schema_digest: str
    """See ``digest_schema``."""
    parent: str | None
    """Digest of the manifest that it follows."""
    layers: tuple[LayerRecord, ...] = ()
    """Those of which the rank wrote or linked a file, with its own files alone."""
    files: tuple[FileRecord, ...] = ()
    """Its small files."""
    error: str | None = None
    """What stopped its part of the save."""
    lost: tuple[str, ...] = ()
    """Layers whose earlier files it could not link: they have to be written anew."""

    @property
    def name(self) -> str:
        """For people."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"


class Whereabouts(_Message):
    """What a rank votes on, for whoever misses its vote on something else."""

    key: str
    """See ``Ballot``."""
    step: int
    name: str
    """Of the rank, for people."""


class LayerSummary(_Message):
    """Of a layer of a published checkpoint, what all ranks need to plan with."""

    name: str
    step: int
    save_index: int
    update_count: int | None
    reason: str


class Verdict(_Message):
    """What became of a save."""

    step: int
    error: str | None
    """Why it was not published; None if it was."""
    kind: str | None = None
    """Of the error."""
    lost: tuple[str, ...] = ()
    parent_step: int | None
    """The newest checkpoint of the run, now."""
    parent: str | None
    """Digest of its manifest."""
    layers: tuple[LayerSummary, ...] = ()
    """If it was published."""


_MessageT = TypeVar("_MessageT", bound=_Message)


def encode_message(message: _Message) -> bytes:
    """As it is sent: JSON, packed; names and keys repeat, so it becomes a quarter."""
    return zlib.compress(message.model_dump_json().encode(), 6)


def decode_message(kind: type[_MessageT], data: bytes) -> _MessageT:
    """Inverse of ``encode_message``.

    Raises:
        FormatError: It is no such message.
    """
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data, _MAX_MESSAGE_NBYTES)
        if unpacker.unconsumed_tail or unpacker.unused_data or not unpacker.eof:
            raise ValueError("it is cut off, too large, or followed by something")
        return kind.model_validate_json(text)
    except (zlib.error, ValidationError, ValueError) as err:
        raise FormatError(
            f"a message of another rank is no {kind.__name__.lower()}",
            kind="rank-message",
            expected="ranks that run the same version of llmtailor",
            found=str(err).splitlines()[0][:200],
        ) from err


def digest_schema(manifest: Manifest) -> str:
    """Of what must be the same on every rank: tensors, optimizers, how the world is cut."""
    fields = manifest.model_dump_json(include={"run_id", "contents", "tensors", "optimizers", "world"}, by_alias=True)
    return digest_of(fields.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a save cannot be published."""

    kind: str
    """``rank-failed``, ``rank-late`` or ``ranks-disagree``."""
    text: str
    """What happened, and on which rank."""
    lost: tuple[str, ...] = ()

    def to_error(self, step: int) -> WriteError:
        """For the callers of the save."""
        return WriteError(
            f"checkpoint-{step} was not published: {self.text}"[:_MAX_TEXT],
            kind=self.kind,
            hint=_HINTS.get(self.kind, "the next save works when the fault is gone; older checkpoints are intact"),
        )


_HINTS = {
    "rank-late": "look at that rank: is it alive, is its disk slow? raise commit_timeout_secs if it needs the time",
    "ranks-disagree": "all ranks must save the same model at the same steps, by the same strategy, in one directory",
}


def judge(own: Vote, votes: Mapping[int, Vote], *, size: int, waited_secs: float) -> Fault | None:
    """Whether a save can be published.

    Args:
        own: The coordinator's vote.
        votes: By rank; a rank that is not there did not vote in time.
        size: Number of ranks.
        waited_secs: How long it was waited for them.
    """
    failed = [vote for _, vote in sorted(votes.items()) if vote.error is not None]
    if failed:
        lost = tuple(sorted({layer for vote in failed for layer in vote.lost}))
        text = "; ".join(f"{vote.name} failed: {vote.error}" for vote in failed[:3])
        return Fault(kind="rank-failed", text=text + _and_more(len(failed) - 3), lost=lost)
    if absent := [rank for rank in range(size) if rank not in votes]:
        names = ", ".join(map(str, absent[:8])) + _and_more(len(absent) - 8)
        return Fault(kind="rank-late", text=f"rank {names} did not finish its part within {waited_secs:.0f} s")
    for field, what in _COMPARED.items():
        others = [vote for _, vote in sorted(votes.items()) if getattr(vote, field) != getattr(own, field)]
        if others:
            told = f"{others[0].name} has {getattr(others[0], field)!r}, rank 0 {getattr(own, field)!r}"
            return Fault(kind="ranks-disagree", text=f"{what} differ: {told}" + _and_more(len(others) - 1))
    return _find_claimed_twice(votes)


def _find_claimed_twice(votes: Mapping[int, Vote]) -> Fault | None:
    """Two ranks cannot both have written a file, nor one the part of another."""
    owners: dict[str, Vote] = {}
    for rank, vote in sorted(votes.items()):
        for layer in vote.layers:
            if any(part.rank != rank for part in layer.parts):
                text = f"{vote.name} claims the part of another rank of layer {layer.name!r}"
                return Fault(kind="ranks-disagree", text=text)
        for file in (*(file for layer in vote.layers for file in layer.files), *vote.files):
            other = owners.setdefault(file.path, vote)
            if other is not vote:
                text = f"{other.name} and {vote.name} both wrote {file.path}"
                return Fault(kind="ranks-disagree", text=text)
    return None


def say_elsewhere(own: Whereabouts, other: Whereabouts) -> str:
    """Why a vote of a rank is missing that votes on something else."""
    if own.step == other.step:
        return f"the ranks tried to save checkpoint-{own.step} another number of times: {other.name} and {own.name}"
    return f"steps differ: {other.name} saves checkpoint-{other.step}, {own.name} checkpoint-{own.step}"


def to_line(text: object, limit: int = 1000) -> str:
    """The first line of something, as a message can carry it: names of files may be no UTF-8."""
    line = next(iter(str(text).splitlines()), "")[:limit]
    return line.encode("utf-8", "backslashreplace").decode()


_COMPARED = {
    "store": "the directories that ranks write to",
    "step": "steps",
    "parent": "the checkpoints that ranks follow",
    "schema_digest": "models, optimizers or their sharding (digests)",
    "choice": "choices of layers (digests)",
}


def _and_more(count: int) -> str:
    return f", and {count} more" if count > 0 else ""


def merge_votes(own: Manifest, votes: Mapping[int, Vote]) -> Manifest:
    """The manifest of all ranks' files.

    Args:
        own: As the coordinator describes the save, with its own files alone.
        votes: Of all ranks, its own included; ``judge`` found no fault.

    Raises:
        ValidationError: They do not make a whole checkpoint.
    """
    records: dict[str, list[LayerRecord]] = defaultdict(list)
    for _, vote in sorted(votes.items()):
        for layer in vote.layers:
            records[layer.name].append(layer)
    layers = tuple(_merge_layer(layer, records[layer.name]) for layer in own.layers)
    files = tuple(sorted((file for vote in votes.values() for file in vote.files), key=lambda file: file.path))
    # Not a copy: that would not be checked.
    fields = {name: getattr(own, name) for name in type(own).model_fields}
    return Manifest(**{**fields, "layers": layers, "files": files})


def _merge_layer(own: LayerRecord, found: Sequence[LayerRecord]) -> LayerRecord:
    if not found:
        return own  # without a file: the manifest will say so
    parts: dict[int, PartRecord] = {part.rank: part for layer in found for part in layer.parts}
    # Who wrote the layer as a whole knows best what it is; an error limit may have made exact what was to be codes.
    first = next((layer for layer in found if layer.weights is not None), found[0])
    counts = [layer.update_count for layer in found if layer.update_count is not None]
    update = {
        "optimizer": next((layer.optimizer for layer in found if layer.optimizer is not None), None),
        "update_count": max(counts, default=None),
        "parts": tuple(parts[rank] for rank in sorted(parts)),
    }
    return first.model_copy(update=update)


def summarize(manifest: Manifest) -> tuple[LayerSummary, ...]:
    """Of a published checkpoint, for the verdict."""
    return tuple(
        LayerSummary(
            name=layer.name,
            step=layer.step,
            save_index=layer.save_index,
            update_count=layer.update_count,
            reason=layer.reason,
        )
        for layer in manifest.layers
    )


def apply_verdict(own: Manifest, verdict: Verdict) -> Manifest:
    """What a rank plans its next save with: the published checkpoint, but of its files only the rank's own."""
    summaries = {each.name: each for each in verdict.layers}
    layers = tuple(
        layer.model_copy(
            update={
                "step": summaries[layer.name].step,
                "save_index": summaries[layer.name].save_index,
                "update_count": summaries[layer.name].update_count,
                "reason": summaries[layer.name].reason,
            }
        )
        for layer in own.layers
    )
    return own.model_copy(update={"layers": layers})


def digest_choice(fields: Mapping[str, object]) -> str:
    """Of what a rank decided to write, in words."""
    return digest_of(json.dumps(fields, sort_keys=True, allow_nan=False).encode())
