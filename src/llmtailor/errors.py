"""Every error LLMTailor raises on purpose.

    TailorError                                                    exit
    +-- NotFoundError        (FileNotFoundError)  nothing there       3
    +-- FormatError          (ValueError)         not what it claims  4
    |   +-- IntegrityError                        bytes changed       5
    +-- InvalidInputError    (ValueError)         the user's wording  6
    +-- IncompatibleError    (ValueError)         does not fit        7
    |   +-- IncompleteError                       something missing   8
    +-- AlreadyExistsError   (FileExistsError)    will not overwrite  9
    +-- WriteError           (OSError)            nothing published  10
    |   +-- LockedError      (BlockingIOError)    another writer     13
    +-- UnsupportedError     (NotImplementedError) not done yet      12

One class for each thing a handler would do about it; the exact fault is ``kind``, a short stable
string that is only ever added to. Builtin parents stand where a caller may already catch them.
Facts are fields; ``str()`` is built from them: what, where, expected, found, next step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = [
    "AlreadyExistsError",
    "FormatError",
    "IncompatibleError",
    "IncompleteError",
    "IntegrityError",
    "InvalidInputError",
    "LinkFallbackWarning",
    "LockedError",
    "NotFoundError",
    "QuarantineWarning",
    "SaveFailedWarning",
    "StaleWarning",
    "StrategyIgnoredWarning",
    "SupersededWarning",
    "TailorError",
    "TailorWarning",
    "UnsupportedError",
    "WriteError",
]


class TailorError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: One sentence, lower case, no full stop: what could not be done, and why.
        kind: Stable name of the fault, for programs ("digest-mismatch").
        path: The file or directory it is about.
        layer: The layer it is about.
        fqn: The parameter or tensor it is about.
        expected: What was expected there.
        found: What was found instead.
        hint: The next step for the user.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        kind: str,
        path: str | Path | None = None,
        layer: str | None = None,
        fqn: str | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.kind = kind
        self.path = None if path is None else str(path)
        self.layer = layer
        self.fqn = fqn
        self.expected = expected
        self.found = found
        self.hint = hint

    def __str__(self) -> str:
        rows = (
            ("path", self.path),
            ("layer", self.layer),
            ("tensor", self.fqn),
            ("expected", self.expected),
            ("found", self.found),
            ("next", self.hint),
        )
        return "\n".join([self.what, *(f"  {key:<9} {value}" for key, value in rows if value is not None)])

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle by their args alone, which would drop every field on the way out of a worker process.
        return _rebuild, (type(self), self.fields())

    def fields(self) -> dict[str, Any]:
        """The facts as a plain dict, for ``--json``."""
        return {
            "what": self.what,
            "kind": self.kind,
            "path": self.path,
            "layer": self.layer,
            "fqn": self.fqn,
            "expected": self.expected,
            "found": self.found,
            "hint": self.hint,
        }


def _rebuild(cls: type[TailorError], fields: dict[str, Any]) -> TailorError:
    return cls(**fields)


class NotFoundError(TailorError, FileNotFoundError):
    """There is no such run, checkpoint, step, layer or tensor."""

    exit_code = 3


class FormatError(TailorError, ValueError):
    """A file is not what it claims to be: unknown, truncated, hostile, or of a newer version."""

    exit_code = 4


class IntegrityError(FormatError):
    """A file's bytes are not the bytes that were published."""

    exit_code = 5


class InvalidInputError(TailorError, ValueError):
    """What the user asked for cannot be understood or makes no sense."""

    exit_code = 6


class IncompatibleError(TailorError, ValueError):
    """A checkpoint does not fit the model or optimizer it is loaded into."""

    exit_code = 7


class IncompleteError(IncompatibleError):
    """Something that must be there has no source."""

    exit_code = 8


class AlreadyExistsError(TailorError, FileExistsError):
    """Refusing to overwrite."""

    exit_code = 9


class WriteError(TailorError, OSError):
    """The disk, a permission or a limit stopped a write; nothing was published, nothing older was touched."""

    exit_code = 10


class UnsupportedError(TailorError, NotImplementedError):
    """Known and not done yet; raised before any byte is written."""

    exit_code = 12


class LockedError(WriteError, BlockingIOError):
    """Another live writer holds the run."""

    exit_code = 13


class TailorWarning(UserWarning):
    """Base of all warnings."""


class LinkFallbackWarning(TailorWarning):
    """The file system refused hard links; unchanged layers cost space or time again."""


class QuarantineWarning(TailorWarning):
    """A checkpoint failed verification and was set aside."""


class SaveFailedWarning(TailorWarning):
    """A save failed; training goes on and older checkpoints are intact."""


class StaleWarning(TailorWarning):
    """Training goes on from a checkpoint that has very old layers."""


class StrategyIgnoredWarning(TailorWarning):
    """All layers were written although the strategy chose some of them."""


class SupersededWarning(TailorWarning):
    """A checkpoint of an abandoned branch was set aside to make room."""
