"""No more bytes than given, for the layers that need them most."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..errors import InvalidInputError
from ..recipe.named import parse_size
from .adaptive import Ranking
from .arguments import format_call
from .context import LayerStatus, SaveContext

__all__ = ["Budget", "Budgeted", "bytes_of"]

_SIZE_FORM = "bytes, as a whole number or as in 500MB, 20GB, 2GiB"


@dataclass(frozen=True, kw_only=True)
class Budgeted(Ranking):
    """Chooses layers up to a number of bytes."""

    def fill(self, context: SaveContext, nbytes: int) -> frozenset[str]:
        """Choose what fits; with the layers that ``choose_layers`` writes anyhow at most ``nbytes``, or those alone.

        Those go first. Then the layers that every save writes, the oldest first; then the others, highest score first,
        importance counting per byte. What does not fit is passed over, for smaller layers behind it.

        Args:
            context: The save.
            nbytes: All that is written counts, weights and optimizer state.

        Raises:
            InvalidInputError: Kind ``no-drift`` or ``no-importance``; see ``Ranking.rank``.
        """
        ranked = self.rank(context, per_byte=self.by == "importance")
        always = self.always(context.layers)
        forced = {layer.name for layer in context.layers if self.must_write(layer, context)}
        steady = sorted((layer for layer in context.layers if layer.name in always), key=context.age_of, reverse=True)
        chosen = forced & always
        spent = _total_of(layer for layer in context.layers if layer.name in forced)
        for layer in [*steady, *ranked]:
            if layer.name not in forced and spent + layer.nbytes <= nbytes:
                chosen.add(layer.name)
                spent += layer.nbytes
        return frozenset(chosen)

    def steady_nbytes(self, layers: Sequence[LayerStatus]) -> int:
        """What the layers take that every save writes."""
        always = self.always(layers)
        return _total_of(layer for layer in layers if layer.name in always)

    def way_out(self, layers: Sequence[LayerStatus]) -> str:
        """What to do about a budget that does not hold them."""
        least = replace(self, first=0, last=0, auxiliary=False).steady_nbytes(layers)
        if least == self.steady_nbytes(layers):
            return "give more; norms, and layers outside of stacks, are always written"
        return f"give more, or write first=0, last=0, auxiliary=False: then {least:,} bytes are needed"


@dataclass(frozen=True)
class Budget(Budgeted):
    """Write as many bytes at every save as given, for the layers with the highest score.

    Layers that are too old are written whatever it costs. A layer that is larger than what the budget has left beside
    the layers that every save writes waits for that.
    """

    limit: float | int | str
    """A share of the bytes of all layers, above 0.0 and up to 1.0; or bytes: whole, or text such as ``20GB``."""

    def __post_init__(self) -> None:
        if isinstance(self.limit, float):
            if not 0 < self.limit <= 1:
                raise InvalidInputError(
                    "argument 'limit' of strategy 'budget' is no share",
                    kind="argument-range",
                    expected=f"above 0.0 and up to 1.0; or {_SIZE_FORM}",
                    found=repr(self.limit),
                    hint='write for example budget(0.5), or budget("20GB")',
                )
        else:
            bytes_of("budget", "limit", self.limit, other="a share up to 1.0; or ")
        self.check_common("budget")

    def select(self, context: SaveContext) -> frozenset[str]:
        """What fits; see ``Budgeted.fill``.

        Raises:
            InvalidInputError: Kind ``budget-too-small``: the layers do not fit that every save writes; ``no-drift`` or
                ``no-importance``.
        """
        limit, steady = self._nbytes(context.layers), self.steady_nbytes(context.layers)
        if steady > limit:
            share = f" ({self.limit} of {_total_of(context.layers):,})" if isinstance(self.limit, float) else ""
            raise InvalidInputError(
                "the budget is too small for the layers that every save writes",
                kind="budget-too-small",
                expected=f"at least {steady:,} bytes, which those layers take",
                found=f"{limit:,} bytes{share}",
                hint=self.way_out(context.layers),
            )
        return self.fill(context, limit)

    @property
    def text(self) -> str:
        """``budget(limit=0.5, by="importance", first=1, last=1, auxiliary=True, max_age=1000)``."""
        return format_call("budget", limit=self.limit, **self.common())

    def _nbytes(self, layers: Iterable[LayerStatus]) -> int:
        if isinstance(self.limit, float):
            return math.floor(self.limit * _total_of(layers))
        return bytes_of("budget", "limit", self.limit)


def _total_of(layers: Iterable[LayerStatus]) -> int:
    return sum(layer.nbytes for layer in layers)


def bytes_of(strategy: str, argument: str, value: object, *, other: str = "") -> int:
    """Bytes that an argument stands for.

    Args:
        strategy: Whose argument it is.
        argument: Its name.
        value: A whole number, or text with a unit.
        other: What else the argument may be, for the error.

    Raises:
        InvalidInputError: Kind ``argument-type`` or ``argument-range``: it is not at least 1 byte.
    """
    nbytes = parse_size(value) if isinstance(value, str) else value
    if type(nbytes) is int and nbytes >= 1:
        return nbytes
    is_size = isinstance(value, str) or type(value) is int
    raise InvalidInputError(
        f"argument {argument!r} of strategy {strategy!r} is no size",
        kind="argument-range" if is_size else "argument-type",
        expected=f"{other}{_SIZE_FORM}",
        found=repr(value),
        hint=f'write for example {argument}="20GB"; units are B, kB, MB, GB, TB, KiB, MiB, GiB, TiB',
    )
