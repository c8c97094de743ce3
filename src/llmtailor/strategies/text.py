"""Strategies as users write them: ``parity``, ``filter(first=2)``, ``budget("20GB", by="drift")``, a function.

The text is parsed, never evaluated: a name, or a call of a name with numbers, quoted text, True and False.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, TypeAlias

from ..errors import InvalidInputError, TailorError
from .budget import Budget
from .budget_per_step import BudgetPerStep
from .context import SaveContext, Strategy
from .custom import Custom
from .drift import Drift
from .filter import Filter
from .full import Full
from .monitored import Monitored
from .parity import Parity
from .plugins import list_plugins, load_plugin
from .round_robin import RoundRobin
from .top_k import TopK

__all__ = ["parse_strategy"]

_Value: TypeAlias = int | float | str | bool

_STRATEGIES: dict[str, type[Strategy]] = {
    "budget": Budget,
    "budget_per_step": BudgetPerStep,
    "drift": Drift,
    "filter": Filter,
    "full": Full,
    "monitored": Monitored,
    "parity": Parity,
    "round_robin": RoundRobin,
    "top_k": TopK,
}
# Far more than any strategy needs, and far less than what exhausts Python's parser.
_MAX_LENGTH = 400
_FORM = 'a name, or a name with numbers or quoted text, as in filter(first=2, every=10) or budget(0.5, by="drift")'
_HINT_ARGUMENTS = "name each argument, and each once"


def parse_strategy(value: str | Strategy | Callable[[SaveContext], Iterable[str]]) -> Strategy:
    """The strategy that a text, a strategy or a function stands for.

    A function becomes ``Custom`` with the default ``max_age``. A name that is not built in is looked for among the
    entry points of installed packages, see ``plugins``.

    Raises:
        InvalidInputError: Kind ``strategy-type`` (not one of the three), ``strategy-syntax``, ``unknown-strategy``,
            ``unknown-argument``, ``argument-missing``, ``argument-twice``, ``argument-type``, ``argument-range`` or
            ``strategy-plugin``.
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
    if name in _STRATEGIES:
        return _make(_STRATEGIES[name], name, positional, named, text)
    plugins = list_plugins()
    if name not in plugins:
        raise _unknown_error(name, [*_STRATEGIES, *sorted(plugins.keys() - _STRATEGIES.keys())], text)
    strategy = load_plugin(plugins[name])
    try:
        return _make(strategy, name, positional, named, text)
    except TailorError:
        raise
    except (TypeError, ValueError) as err:
        raise InvalidInputError(
            f"strategy {name!r} does not take these arguments",
            kind="argument-range",
            expected=", ".join(_fields_of(strategy)) or "no arguments",
            found=text,
            hint=str(err),
        ) from err


def _unknown_error(name: str, known: list[str], text: str) -> InvalidInputError:
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]}?" if near else 'write for example "parity"'
    return InvalidInputError(
        f"there is no strategy {name!r}",
        kind="unknown-strategy",
        expected=", ".join(known),
        found=text,
        hint="pass the function itself, not its name" if name == "custom" else hint,
    )


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
    return InvalidInputError(
        "cannot read this as a strategy",
        kind="strategy-syntax",
        expected=_FORM,
        found=repr(shown),
        hint=_hint_syntax(text.partition("(")[0].strip()),
    )


def _hint_syntax(written: str) -> str:
    # To Python, round-robin(4) is a difference.
    name = written.lower().replace("-", "_")
    if "-" in written and name in _STRATEGIES:
        return f"did you mean {name}?"
    if name in ("budget", "budget_per_step"):
        return f'a size goes in quotes, as in {name}("20GB")'
    return "for anything more, pass a function"


def _make(
    strategy: type[Strategy],
    name: str,
    positional: list[ast.expr],
    named: list[tuple[str, ast.expr]],
    text: str,
) -> Strategy:
    """The strategy with these arguments, as its own fields take them; what they may be it says itself."""
    known = _fields_of(strategy)
    places = [argument for argument, field in known.items() if not field.kw_only]
    if len(positional) > len(places):
        what = f"strategy {name!r} takes {len(places)} arguments without a name"
        raise _argument_error(what, "unknown-argument", known, text)
    bound: dict[str, _Value] = {}
    for argument, node in [*zip(places, positional, strict=False), *named]:
        if argument not in known:
            near = difflib.get_close_matches(argument, known, n=1)
            what = f"strategy {name!r} has no argument {argument!r}"
            hint = f"did you mean {near[0]}?" if near else _HINT_ARGUMENTS
            raise _argument_error(what, "unknown-argument", known, text, hint=hint)
        if argument in bound:
            raise _argument_error(f"argument {argument!r} is given twice", "argument-twice", known, text)
        bound[argument] = _read_value(name, argument, node)
    missing = [argument for argument, field in known.items() if argument not in bound and _is_required(field)]
    if missing:
        what = f"strategy {name!r} needs an argument: {', '.join(missing)}"
        raise _argument_error(what, "argument-missing", known, text, hint=f"write {name}({missing[0]}=...)")
    make: Callable[..., Strategy] = strategy
    return make(**bound)


def _fields_of(strategy: type[Any]) -> dict[str, Field[Any]]:
    """Argument -> field, those first that need no name."""
    taken = (field for field in fields(strategy) if field.init)
    return {field.name: field for field in sorted(taken, key=lambda field: bool(field.kw_only))}


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _argument_error(
    what: str, kind: str, known: Mapping[str, object], text: str, *, hint: str = _HINT_ARGUMENTS
) -> InvalidInputError:
    return InvalidInputError(what, kind=kind, expected=", ".join(known) or "no arguments", found=text, hint=hint)


def _read_value(strategy: str, argument: str, node: ast.expr) -> _Value:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        # True is an int to Python, and -True another.
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if (
            type(value) is not bool
        ):
            return -value
    is_word = isinstance(node, ast.Name)
    raise InvalidInputError(
        f"argument {argument!r} of strategy {strategy!r} is no plain value",
        kind="argument-type",
        expected="a number, quoted text, True or False",
        found=ast.unparse(node),
        hint=f'text goes in quotes: {argument}="{ast.unparse(node)}"' if is_word else f"write for example {argument}=2",
    )
