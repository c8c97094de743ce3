"""Strategies of other packages.

A package names them in its ``pyproject.toml``; then ``parse_strategy`` knows them like those that are built in:

    [project.entry-points."llmtailor.strategies"]
    mine = "my_package.strategies:Mine"

A plug-in is a subclass of ``Strategy`` that is a frozen dataclass. Nothing is imported until its name is used.
"""

from __future__ import annotations

import inspect
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..errors import InvalidInputError
from .context import Strategy

__all__ = ["GROUP", "list_plugins", "load_plugin"]

GROUP = "llmtailor.strategies"
"""The entry-point group."""


def list_plugins() -> dict[str, EntryPoint]:
    """Name -> entry point of each installed plug-in; nothing is imported. Of one name the first on the path counts."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, point)
    return found


def load_plugin(point: EntryPoint) -> type[Strategy]:
    """Import a plug-in.

    Raises:
        InvalidInputError: Kind ``strategy-plugin``: it cannot be imported, or is no strategy.
    """
    try:
        loaded = point.load()
    except Exception as err:  # an import runs the package's code, which raises what it likes
        raise _error(point, "cannot be imported", f"{type(err).__name__}: {err}") from err
    fault = _fault_of(loaded)
    if fault is not None:
        raise _error(point, "is not a strategy", fault)
    strategy: type[Strategy] = loaded
    return strategy


def _fault_of(loaded: Any) -> str | None:
    """What keeps something from being a strategy's class."""
    if not isinstance(loaded, type) or not issubclass(loaded, Strategy):
        return f"{loaded!r}, no subclass of Strategy"
    if inspect.isabstract(loaded):
        return f"{loaded.__qualname__}, which lacks {', '.join(sorted(loaded.__abstractmethods__))}"
    # The mark is inherited: a plain subclass of a dataclass has fields that its constructor does not know.
    parameters = loaded.__dict__.get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        return f"{loaded.__qualname__}, which is no frozen dataclass"
    return None


def _error(point: EntryPoint, what: str, found: str) -> InvalidInputError:
    origin = f" of {point.dist.name} {point.dist.version}" if point.dist is not None else ""
    return InvalidInputError(
        f"strategy {point.name!r}{origin} {what}",
        kind="strategy-plugin",
        expected=f"a subclass of llmtailor.strategies.Strategy that is a frozen dataclass, at {point.value}",
        found=found,
        hint="repair or remove that package; built-in strategies do not need it",
    )
