"""JSON that transformers wrote: bounded, no duplicate keys, one exception type; NaN is let through.

Not ``strict_json``: a loss that was NaN once stands as NaN in ``trainer_state.json`` ever after, and some models'
configurations have an Infinity. Both are copied, and neither is computed with.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ...errors import FormatError
from ..source_files import open_source

__all__ = ["parse_json_object", "read_json_object", "read_text"]

# The log of a million steps in trainer_state.json, or the index of a million tensors.
_MAX_NBYTES = 256 * 2**20


def read_json_object(path: Path, *, what: str) -> dict[str, Any]:
    """Read a JSON object from a resolved path.

    Args:
        path: As ``resolve_source`` gave it.
        what: What it is, for the error ("index").

    Raises:
        NotFoundError: There is no such file.
        FormatError: Not a regular file, too large, or not such JSON.
    """
    return parse_json_object(read_text(path), what=what, path=path)


def read_text(path: Path) -> bytes:
    """The bytes of a small file.

    Raises:
        NotFoundError: There is no such file.
        FormatError: Not a regular file, or too large.
    """
    with open(open_source(path), "rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > _MAX_NBYTES:
            raise FormatError(
                "a JSON file is too large to be one",
                kind="bad-json",
                path=path,
                expected=f"at most {_MAX_NBYTES} bytes",
                found=f"{nbytes} bytes",
            )
        return file.read(_MAX_NBYTES)


def parse_json_object(text: bytes, *, what: str, path: Path | str) -> dict[str, Any]:
    """Parse a JSON object; NaN and Infinity are numbers here.

    Raises:
        FormatError: Not JSON, not UTF-8, not an object, nested too deeply, or a key stands there twice.
    """

    def refuse(detail: str) -> FormatError:
        return FormatError(
            f"cannot read {what}: {detail}", kind="bad-json", path=path, hint="copy the file from the source again"
        )

    def pairs_to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            raise refuse(f"key {next(key for key in keys if keys.count(key) > 1)[:200]!r} stands there twice")
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=pairs_to_dict)
    except FormatError:
        raise
    except RecursionError as err:
        raise refuse("nested too deeply") from err
    except ValueError as err:  # JSONDecodeError, UnicodeDecodeError, an integer of thousands of digits
        raise refuse(str(err)[:500]) from err
    if not isinstance(value, dict):
        raise refuse(f"expected an object, found {type(value).__name__}")
    return value
