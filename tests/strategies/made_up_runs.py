"""Models, strategies and runs that never were: what a strategy is told, save after save."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from llmtailor.drift import LayerDrift
from llmtailor.layers import LayerKind
from llmtailor.strategies import (
    Budget,
    BudgetPerStep,
    Choice,
    Drift,
    Filter,
    Full,
    LayerStatus,
    Monitored,
    Parity,
    RoundRobin,
    SaveContext,
    Strategy,
    TopK,
    choose_layers,
)
from llmtailor.strategies.adaptive import Adaptive

Model = tuple[LayerStatus, ...]
Drifts = Mapping[str, LayerDrift | None]


def make_layer(
    name: str,
    kind: LayerKind = LayerKind.BLOCK,
    *,
    nbytes: int = 10,
    saved: int | None = 0,
    drift: LayerDrift | None = None,
) -> LayerStatus:
    stack, _, index = name.rpartition(".")
    is_block = kind is LayerKind.BLOCK
    return LayerStatus(
        name=name,
        kind=kind,
        stack=stack if is_block else None,
        index=int(index) if is_block else None,
        nbytes=nbytes,
        saved_step=saved,
        drift=drift,
    )


def moved(relative: float = 0.1, *, importance: float | None = 1.0, update: float | None = 1e-3) -> LayerDrift:
    return LayerDrift(relative=relative, importance=importance, update=update, momentum=None, rate=None)


def make_blocks(*drifts: LayerDrift | None, nbytes: int | Sequence[int] = 10, saved: int | None = 0) -> Model:
    """Blocks of one stack, with how they moved."""
    sizes = [nbytes] * len(drifts) if isinstance(nbytes, int) else nbytes
    return tuple(
        make_layer(f"layers.{index}", nbytes=size, saved=saved, drift=drift)
        for index, (drift, size) in enumerate(zip(drifts, sizes, strict=True))
    )


def context_of(
    layers: Iterable[LayerStatus], *, step: int = 100, save_index: int = 3, previous: int = 90
) -> SaveContext:
    return SaveContext(step=step, save_index=save_index, previous_step=previous, layers=tuple(layers))


# ---- Drawn ----

SIZES = st.integers(0, 10) | st.integers(0, 10**9)
_NUMBERS = st.sampled_from([0.0, 1e-5, 0.5, math.inf, math.nan]) | st.floats(0, 10)


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Any stacks, embeddings, heads and others, in any order; nothing saved yet."""
    blocks = [f"{stack}.{i}" for stack in ("layers", "vision.blocks") for i in range(draw(st.integers(0, 6)))]
    named = [(name, LayerKind.BLOCK) for name in blocks]
    for kind in (LayerKind.EMBEDDING, LayerKind.HEAD, LayerKind.OTHER):
        named += [(f"{kind.value}{i}", kind) for i in range(draw(st.integers(0, 2)))]
    layers = [make_layer(name, kind, nbytes=draw(SIZES), saved=None) for name, kind in named]
    return tuple(draw(st.permutations(layers)))


_COMMON = {"first": st.integers(0, 2), "last": st.integers(0, 2), "auxiliary": st.booleans()}
_MAX_AGE = st.integers(1, 300)
_BY = st.sampled_from(["importance", "drift", "age"])


@st.composite
def fixed(draw: st.DrawFn) -> Strategy:
    """A strategy that does not look at how layers move."""
    max_age = draw(st.none() | _MAX_AGE)
    return draw(
        st.just(Full())
        | st.just(Parity(max_age=max_age))
        | st.builds(Filter, *[st.integers(0, 3)] * 2, st.integers(1, 6), max_age=st.just(max_age))
        | st.builds(RoundRobin, st.integers(1, 20), max_age=st.just(max_age))
    )


@st.composite
def unbudgeted(draw: st.DrawFn) -> Adaptive:
    common = {name: draw(values) for name, values in _COMMON.items()} | {"max_age": draw(_MAX_AGE)}
    positive = st.floats(1e-6, 5)
    kind = draw(st.sampled_from([TopK, Drift, Monitored]))
    if kind is TopK:
        return TopK(draw(st.integers(1, 9)), by=draw(_BY), **common)
    if kind is Drift:
        return Drift(draw(positive), **common)
    end = draw(positive)
    return Monitored(end + draw(st.floats(0, 5)), end=end, decay=draw(st.floats(0.1, 1e4)), **common)


@st.composite
def budgeted(draw: st.DrawFn, model: Model) -> Budget | BudgetPerStep:
    """A budget that holds at least the layers of the model that every save writes."""
    common: dict[str, Any] = {name: draw(values) for name, values in _COMMON.items()}
    common |= {"max_age": draw(_MAX_AGE), "by": draw(_BY)}
    if draw(st.booleans()):
        # At a byte per step the interval is what a save takes.
        needed = BudgetPerStep(1, **common | {"max_age": 10**30}).interval(model)
        return BudgetPerStep(-(-needed // draw(st.integers(1, common["max_age"]))), **common)
    steady = Budget(1, **common).steady_nbytes(model)
    if draw(st.booleans()):
        return Budget(max(1, steady + draw(SIZES)), **common)
    share = draw(st.floats(0.01, 1))
    assume(math.floor(share * sum(layer.nbytes for layer in model)) >= steady)
    return Budget(share, **common)


def adaptive(model: Model) -> st.SearchStrategy[Adaptive]:
    return unbudgeted() | budgeted(model)


@st.composite
def drifts_for(draw: st.DrawFn, strategy: Strategy, model: Model) -> Drifts:
    """What one measurement says; None where the strategy does not look."""
    inner = {layer.name for layer in strategy.others(model)} if isinstance(strategy, Adaptive) else set()
    by = getattr(strategy, "by", None)

    def draw_one(name: str) -> LayerDrift | None:
        if name not in inner or not strategy.needs_drift:
            return draw(st.none() | st.just(moved()))
        importance = draw(_NUMBERS if by == "importance" else st.none() | _NUMBERS)
        update = draw(_NUMBERS if isinstance(strategy, Monitored) else st.none() | _NUMBERS)
        return moved(draw(_NUMBERS), importance=importance, update=update)

    return {layer.name: draw_one(layer.name) for layer in model}


@dataclass(frozen=True)
class Plan:
    """A run that is to be made: when it saves, and what is measured then."""

    model: Model
    strategy: Strategy
    saves: tuple[tuple[int, Drifts], ...]
    """Step and drifts, by rising step."""


@st.composite
def plans(draw: st.DrawFn, *, kinds: str = "all") -> Plan:
    """``kinds``: all, adaptive or budgeted."""
    model = draw(models())
    chosen = budgeted(model) if kinds == "budgeted" else adaptive(model)
    strategy = draw(fixed() | chosen if kinds == "all" else chosen)
    gaps = draw(st.lists(st.integers(0, 3) | st.integers(0, 400), min_size=1, max_size=8))
    steps = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    return Plan(model, strategy, tuple((step, draw(drifts_for(strategy, model))) for step in steps))


# ---- Made ----


@dataclass(frozen=True)
class Save:
    """A save that was made."""

    context: SaveContext
    choices: tuple[Choice, ...]

    @property
    def written(self) -> frozenset[str]:
        return frozenset(choice.layer for choice in self.choices if choice.is_saved)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.context.layers if layer.name in self.written)

    @property
    def ages(self) -> dict[str, int]:
        """Of each layer, after the save."""
        return {name: self.context.step - at for name, at in json.loads(self.manifest)["layers"].items()}

    @property
    def manifest(self) -> str:
        """What the checkpoint keeps."""
        step = self.context.step
        saved = {each.name: step if each.name in self.written else each.saved_step for each in self.context.layers}
        return json.dumps({"step": step, "save_index": self.context.save_index, "layers": saved})


def replay(plan: Plan, manifest: str | None = None) -> Iterator[Save]:
    """Make the saves of a run; from a manifest on, those after it."""
    kept = None if manifest is None else json.loads(manifest)
    done = 0 if kept is None else kept["save_index"] + 1
    for save_index, (step, drifts) in enumerate(plan.saves[done:], done):
        saved = {} if kept is None else kept["layers"]
        layers = [
            dataclasses.replace(layer, saved_step=saved.get(layer.name), drift=drifts[layer.name])
            for layer in plan.model
        ]
        previous = None if kept is None else kept["step"]
        context = SaveContext(step=step, save_index=save_index, previous_step=previous, layers=tuple(layers))
        save = Save(context, choose_layers(plan.strategy, context))
        kept = json.loads(save.manifest)
        yield save
