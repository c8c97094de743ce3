"""A strategy that is somebody's function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..errors import InvalidInputError
from .arguments import check_number, format_call
from .context import DEFAULT_MAX_AGE, SaveContext, Strategy, check_names

__all__ = ["Custom"]


@dataclass(frozen=True)
class Custom(Strategy):
    """Write the layers that a function chooses.

    Nothing bounds how long a function may leave a layer out, so ``max_age`` is not optional here.
    """

    function: Callable[[SaveContext], Iterable[str]]
    """Told the save, it returns names of layers, in any order."""
    max_age: int = DEFAULT_MAX_AGE
    """In optimizer steps."""

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise InvalidInputError(
                "a custom strategy needs a function",
                kind="strategy-type",
                expected="a function of a SaveContext that returns layer names",
                found=repr(self.function),
                hint="pass the function itself, as in Custom(choose, max_age=500)",
            )
        check_number("custom", "max_age", self.max_age, least=1)

    def select(self, context: SaveContext) -> frozenset[str]:
        """What the function chooses.

        Raises:
            InvalidInputError: It chose what is not a layer, or returned something other than a list of names.
        """
        names = self.function(context)
        # Text is iterable too: "norm" would be four layers of one letter.
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise InvalidInputError(
                f"strategy {self.text} did not return layer names",
                kind="strategy-answer",
                expected="an iterable of layer names",
                found=repr(names),
                hint="return a list, empty if nothing is to be written",
            )
        return check_names(names, context)

    @property
    def text(self) -> str:
        """``custom(<function's name>, max_age=1000)``; a record of what ran, which ``parse_strategy`` refuses."""
        name = getattr(self.function, "__qualname__", None) or type(self.function).__qualname__
        return format_call("custom", max_age=self.max_age).replace("(", f"({name}, ", 1)
