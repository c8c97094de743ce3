"""JSON from files nobody vouches for: bounded, no duplicate keys, no NaN, one exception type."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .errors import FormatError

__all__ = ["parse_object"]


def parse_object(text: bytes, *, what: str, path: Path | str) -> dict[str, Any]:
    """Parse a JSON object strictly.

    Args:
        text: UTF-8 bytes; the caller has bounded their number.
        what: What the text is, for the error ("manifest").
        path: Where it was read.

    Raises:
        FormatError: Not JSON, not UTF-8, not an object, nested too deeply, a duplicate key, NaN, Infinity or a
            number too large for a float.
    """

    def refuse(detail: str) -> FormatError:
        return FormatError(f"cannot read {what}: {detail}", kind="bad-json", path=path, hint=_HINT)

    def pairs_to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise refuse(f"key {twice!r} stands there twice")
        return result

    def refuse_constant(name: str) -> None:
        raise refuse(f"{name} is not JSON")

    def parse_float(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number):
            raise refuse(f"{digits[:80]} is out of range")
        return number

    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=pairs_to_dict,
            parse_constant=refuse_constant,
            parse_float=parse_float,
        )
    except FormatError:
        raise
    except RecursionError as err:
        raise refuse("nested too deeply") from err
    except ValueError as err:  # JSONDecodeError and UnicodeDecodeError
        raise refuse(str(err)) from err
    if not isinstance(value, dict):
        raise refuse(f"expected an object, found {type(value).__name__}")
    return value


_HINT = "the file was damaged or is not one of ours; llmtailor verify tells which files of a checkpoint are good"
