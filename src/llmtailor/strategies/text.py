"""Strategies as users write them: ``parity``, ``filter(first=2, every=10)``, a function.

The text is parsed, never evaluated: a name, or a call of a name with whole numbers.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Iterable
from dataclasses import fields

from ..errors import InvalidInputError
from .context import SaveContext, Strategy
from .custom import Custom
from .filter import Filter
from .full import Full
from .parity import Parity
from .round_robin import RoundRobin

__all__ = ["parse_strategy"]

_STRATEGIES: dict[str, type[Full] | type[Parity] | type[Filter] | type[RoundRobin]] = {
    "filter": Filter,
    "full": Full,
    "parity": Parity,
    "round_robin": RoundRobin,
}
# Far more than any strategy needs, and far less than what exhausts Python's parser.
_MAX_LENGTH = 200
_FORM = "a name, or a name with whole numbers, as in filter(first=2, every=10)"


def parse_strategy(value: str | Strategy | Callable[[SaveContext], Iterable[str]]) -> Strategy:
    """The strategy that a text, a strategy or a function stands for.

    A function becomes ``Custom`` with the default ``max_age``.

    Raises:
        InvalidInputError: Kind ``strategy-type`` (not one of the three), ``strategy-syntax``, ``unknown-strategy``,
            ``unknown-argument``, ``argument-twice``, ``argument-type`` or ``argument-range``.
    """
    if isinstance(value, Strategy):
        return value
    if isinstance(value, str):
        return _parse_text(value)
    # A class is callable too, but Parity for Parity() is a slip, not a function.
    if isinstance(value, type) or not callable(value):
        raise _type_error(value)
    return Custom(value)


def _type_error(value: object) -> InvalidInputError:
    is_class = isinstance(value, type) and issubclass(value, Strategy)
    return InvalidInputError(
        "this is not a strategy",
        kind="strategy-type",
        expected="a text, a strategy or a function",
        found=repr(value),
        hint="call the class to make a strategy" if is_class else 'write for example "parity"',
    )


def _parse_text(text: str) -> Strategy:
    name, positional, named = _split_call(text)
    if name not in _STRATEGIES:
        near = difflib.get_close_matches(name.lower(), _STRATEGIES, n=1)
        raise InvalidInputError(
            f"there is no strategy {name!r}",
            kind="unknown-strategy",
            expected=", ".join(_STRATEGIES),
            found=text,
            hint=_hint_name(name, near),
        )
    return _STRATEGIES[name](**_bind(name, positional, named, text))


def _hint_name(name: str, near: list[str]) -> str:
    if name == "custom":
        return "pass the function itself, not its name"
    return f"did you mean {near[0]}?" if near else 'write for example "parity"'


def _split_call(text: str) -> tuple[str, list[ast.expr], list[tuple[str, ast.expr]]]:
    """Name, positional and named arguments; what the arguments are is not looked at."""
    try:
        if len(text) > _MAX_LENGTH:
            raise SyntaxError("too long")
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _syntax_error(text) from error
    match node:
        case ast.Name(id=name):
            return name, [], []
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            named = [(keyword.arg, keyword.value) for keyword in keywords if keyword.arg is not None]
            if len(named) == len(keywords) and not any(isinstance(arg, ast.Starred) for arg in args):
                return name, args, named
    raise _syntax_error(text)


def _syntax_error(text: str) -> InvalidInputError:
    shown = text if len(text) <= _MAX_LENGTH else f"{text[:40]}... ({len(text)} characters)"
    # To Python, round-robin(4) is a difference.
    written = text.partition("(")[0].strip()
    name = written.lower().replace("-", "_")
    return InvalidInputError(
        "cannot read this as a strategy",
        kind="strategy-syntax",
        expected=_FORM,
        found=repr(shown),
        hint=f"did you mean {name}?"
        if "-" in written and name in _STRATEGIES
        else "for anything more, pass a function",
    )


def _bind(name: str, positional: list[ast.expr], named: list[tuple[str, ast.expr]], text: str) -> dict[str, int]:
    """Argument -> value, as the strategy's own fields take them."""
    known = {field.name: field.kw_only for field in fields(_STRATEGIES[name])}
    places = [argument for argument, is_kw_only in known.items() if not is_kw_only]
    if len(positional) > len(places):
        raise _argument_error(
            f"strategy {name!r} takes {len(places)} arguments without a name", "unknown-argument", known, text
        )
    bound: dict[str, int] = {}
    for argument, node in [*zip(places, positional, strict=False), *named]:
        if argument not in known:
            near = difflib.get_close_matches(argument, known, n=1)
            what = f"strategy {name!r} has no argument {argument!r}"
            raise _argument_error(what, "unknown-argument", known, text, near)
        if argument in bound:
            raise _argument_error(f"argument {argument!r} is given twice", "argument-twice", known, text)
        bound[argument] = _read_number(name, argument, node)
    return bound


def _argument_error(
    what: str, kind: str, known: Iterable[str], text: str, near: list[str] | None = None
) -> InvalidInputError:
    return InvalidInputError(
        what,
        kind=kind,
        expected=", ".join(known) or "no arguments",
        found=text,
        hint=f"did you mean {near[0]}?" if near else "name each argument, and each once",
    )


def _read_number(strategy: str, argument: str, node: ast.expr) -> int:
    match node:
        # type() and not isinstance(): True is an int.
        case ast.Constant(value=value) if type(value) is int:
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=value)) if type(value) is int:
            return -value
    raise InvalidInputError(
        f"argument {argument!r} of strategy {strategy!r} is not a whole number",
        kind="argument-type",
        expected="a whole number",
        found=ast.unparse(node),
        hint=f"write for example {argument}=2",
    )
