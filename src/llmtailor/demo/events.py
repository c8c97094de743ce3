"""What a training child tells its parent: one JSON object a line, over a pipe."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

__all__ = [
    "ChildSpec",
    "Event",
    "FinishedEvent",
    "LossEvent",
    "ReadyEvent",
    "ResumedEvent",
    "SaveEvent",
    "SaveFailedEvent",
    "encode_event",
    "parse_event",
    "split_lines",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """What one training process is to do."""

    run: str
    """Directory of its checkpoints."""
    strategy: str
    resume: bool
    keep: int | None
    """How many checkpoints to keep; None keeps all."""
    steps: int
    save_steps: int
    size: str
    seed: int
    threads: int
    events_fd: int = -1
    """Where it writes its events."""

    def encode(self) -> str:
        """As the one argument of the child."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def decode(cls, text: str) -> ChildSpec:
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyEvent:
    """Training starts."""

    num_parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumedEvent:
    """Training goes on from a checkpoint."""

    step: int
    layer_steps: dict[str, int]
    """Layer -> step at which it was saved, in model order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossEvent:
    """A step is done; sent before that step's save begins."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveEvent:
    """A checkpoint is published."""

    step: int
    written_nbytes: int
    stall_secs: float
    """Training waited this long."""
    total_secs: float
    """From the call to the acknowledgement."""
    num_layers_written: int
    num_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailedEvent:
    """A save failed and training went on."""

    step: int
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedEvent:
    """Training reached its end and the model was evaluated."""

    validation_loss: float
    """Mean over the validation bytes, in nats."""


Event = ReadyEvent | ResumedEvent | LossEvent | SaveEvent | SaveFailedEvent | FinishedEvent

_KINDS: dict[str, type[Event]] = {
    "ready": ReadyEvent,
    "resumed": ResumedEvent,
    "loss": LossEvent,
    "save": SaveEvent,
    "save-failed": SaveFailedEvent,
    "finished": FinishedEvent,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def encode_event(event: Event) -> bytes:
    """One line; inverse of ``parse_event``."""
    return json.dumps({"event": _NAMES[type(event)], **dataclasses.asdict(event)}).encode() + b"\n"


def parse_event(line: bytes) -> Event:
    """The event of one line."""
    fields = json.loads(line)
    return _KINDS[fields.pop("event")](**fields)


def split_lines(buffer: bytes) -> tuple[list[bytes], bytes]:
    """Whole lines of what came through the pipe, and the beginning of the next.

    A child that is killed may leave half a line; it stays in the rest and is never parsed.
    """
    *lines, rest = buffer.split(b"\n")
    return lines, rest
