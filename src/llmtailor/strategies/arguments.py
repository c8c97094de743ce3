"""What arguments of strategies may be, and how they are written down."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Collection

from ..errors import InvalidInputError

__all__ = ["check_flag", "check_number", "check_positive", "check_word", "format_call"]


def check_number(strategy: str, argument: str, value: object, *, least: int, optional: bool = False) -> None:
    """Raises if a strategy's argument is not a whole number of at least ``least`` (or None, if ``optional``).

    Raises:
        InvalidInputError: Kind ``argument-type`` or ``argument-range``.
    """
    if value is None and optional:
        return
    # bool is an int to Python, but "first=True" is a mistake.
    if type(value) is not int:
        what, kind = f"argument {argument!r} of strategy {strategy!r} is not a whole number", "argument-type"
    elif value < least:
        what, kind = f"argument {argument!r} of strategy {strategy!r} is too small", "argument-range"
    else:
        return
    raise InvalidInputError(
        what,
        kind=kind,
        expected=f"a whole number of at least {least}",
        found=repr(value),
        hint=f"write for example {argument}={max(least, 2)}",
    )


def check_positive(strategy: str, argument: str, value: object, *, example: float) -> None:
    """Raises if a strategy's argument is not a number above 0.

    Raises:
        InvalidInputError: Kind ``argument-type`` or ``argument-range``.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        what, kind = f"argument {argument!r} of strategy {strategy!r} is not a number", "argument-type"
    elif not 0 < value <= sys.float_info.max:
        what, kind = f"argument {argument!r} of strategy {strategy!r} makes no sense", "argument-range"
    else:
        return
    raise InvalidInputError(
        what,
        kind=kind,
        expected="a number above 0",
        found=repr(value),
        hint=f"write for example {argument}={example}",
    )


def check_flag(strategy: str, argument: str, value: object) -> None:
    """Raises if a strategy's argument is neither True nor False.

    Raises:
        InvalidInputError: Kind ``argument-type``.
    """
    if type(value) is not bool:
        raise InvalidInputError(
            f"argument {argument!r} of strategy {strategy!r} is neither True nor False",
            kind="argument-type",
            expected="True or False",
            found=repr(value),
            hint=f"write for example {argument}=False",
        )


def check_word(strategy: str, argument: str, value: object, words: Collection[str]) -> None:
    """Raises if a strategy's argument is none of some words.

    Raises:
        InvalidInputError: Kind ``argument-type`` or ``argument-range``.
    """
    if isinstance(value, str) and value in words:
        return
    near = difflib.get_close_matches(value.lower(), words, n=1) if isinstance(value, str) else []
    example = f'{argument}="{near[0] if near else next(iter(words))}"'
    raise InvalidInputError(
        f"argument {argument!r} of strategy {strategy!r} is not a word it knows",
        kind="argument-range" if isinstance(value, str) else "argument-type",
        expected=", ".join(f'"{word}"' for word in words),
        found=repr(value),
        hint=f"did you mean {example}?" if near else f"write for example {example}",
    )


def format_call(name: str, **arguments: object) -> str:
    """``name(key=value, ...)`` without the arguments that are None; text in double quotes."""
    return f"{name}({', '.join(f'{key}={_format(value)}' for key, value in arguments.items() if value is not None)})"


def _format(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else str(value)
