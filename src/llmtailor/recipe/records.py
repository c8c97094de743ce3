"""What a recipe says, once it is known to be well formed. Names and paths as written; nothing was opened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from .faults import Place

__all__ = [
    "LayerChoice",
    "MergekitRecipe",
    "ModelSource",
    "NamedRecipe",
    "Output",
    "Recipe",
    "Slice",
    "SliceSource",
    "WeightRule",
    "WeightSource",
    "sources_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What is to be written; None leaves the choice to the merge."""

    format: str | None = None
    """``hf``, ``tailored``, ``deepspeed`` or ``dcp``."""
    dtype: str | None = None
    """Of the weights, in safetensors spelling: ``BF16``, ``F16`` or ``F32``."""
    shard_nbytes: int | None = None
    """Upper bound of a weights file."""
    weights_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightRule:
    """How much a source counts in an average, for some tensors."""

    values: tuple[float, ...]
    """One number, or several laid evenly over the slice's layers from first to last, with straight lines between."""
    filter: str | None
    """The rule holds for tensors whose name contains it; None for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceSource:
    """Blocks of one checkpoint."""

    model: str
    start: int
    """First block, from 0."""
    end: int
    """One past the last; equal to ``start`` in LLMTailor's ranges that name an auxiliary layer."""
    rules: tuple[WeightRule, ...] = ()
    """The first that holds for a tensor decides; those of the slice and of the recipe follow its own."""
    place: Place
    """Of the range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Blocks that follow each other in the target, each an average over the sources if there are several."""

    sources: tuple[SliceSource, ...]
    """Of equal length."""
    normalize: bool
    """Divide the weights by their sum."""
    place: Place

    @property
    def num_blocks(self) -> int:
        return self.sources[0].end - self.sources[0].start


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """All of one checkpoint."""

    model: str
    rules: tuple[WeightRule, ...] = ()
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSource:
    """An entry of ``pre_weights`` or ``post_weights``: where an auxiliary layer comes from."""

    name: str
    """Of one of its tensors: ``model.norm.weight``."""
    model: str
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class MergekitRecipe:
    """A recipe in mergekit's dialect, LLMTailor's additions included."""

    path: str
    """Of the file."""
    method: str
    """``passthrough``, ``linear``, or another that only mergekit knows."""
    slices: tuple[Slice, ...] = ()
    models: tuple[ModelSource, ...] = ()
    """One of ``slices``, ``models`` and ``modules`` is not empty."""
    modules: tuple[str, ...] = ()
    """The checkpoints that ``modules`` names."""
    normalize: bool = True
    """Of ``models``."""
    base_model: str | None = None
    pre_weights: tuple[WeightSource, ...] = ()
    post_weights: tuple[WeightSource, ...] = ()
    tokenizer: str | None = None
    """``base``, or a path."""
    output: Output = field(default_factory=Output)
    needs_mergekit: str | None = None
    """What in it only mergekit itself can do ("merge_method slerp"); None if all can be done here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """An entry of ``layers``: some layers and where they come from."""

    patterns: tuple[str, ...]
    """Names, ranges and globs; see ``patterns``."""
    sources: tuple[str, ...]
    weights: tuple[float, ...]
    """As many as sources; their sum is not 0, and they are divided by it."""
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedRecipe:
    """A recipe in our own dialect."""

    path: str
    """Of the file."""
    base: str | None = None
    """Where layers come from that nobody names."""
    choices: tuple[LayerChoice, ...] = ()
    state_from: str | None = None
    output: Output = field(default_factory=Output)


Recipe: TypeAlias = MergekitRecipe | NamedRecipe


def sources_of(recipe: Recipe) -> tuple[str, ...]:
    """The checkpoints that a recipe needs, as written, in order, each once.

    A path of ``tokenizer_source`` is not among them: only its tokenizer files are copied.
    """
    if isinstance(recipe, NamedRecipe):
        named = [recipe.base, *(path for choice in recipe.choices for path in choice.sources), recipe.state_from]
    else:
        named = [
            recipe.base_model,
            *(source.model for each in recipe.slices for source in each.sources),
            *(source.model for source in recipe.models),
            *recipe.modules,
            *(source.model for source in (*recipe.pre_weights, *recipe.post_weights)),
        ]
    return tuple(dict.fromkeys(path for path in named if path is not None))
