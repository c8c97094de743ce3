"""Models as a recipe sees them: names and shapes, no bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llmtailor.layers import LayerMap, map_names
from llmtailor.recipe import Resolution, SourceLayers, parse_recipe, resolve


def layers_of(
    num_blocks: int, *, tied: bool = False, stack: str = "layers", only: Iterable[str] | None = None
) -> LayerMap:
    """The layers of a small Llama; ``only`` leaves those of a partial checkpoint."""
    names = ["model.embed_tokens.weight"]
    for index in range(num_blocks):
        modules = ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
        names += [f"model.{stack}.{index}.{module}.weight" for module in modules]
    names += ["model.norm.weight"] + ([] if tied else ["lm_head.weight"])
    whole = map_names(dict.fromkeys(names, (4, 4)))
    kept = whole.names if only is None else tuple(only)
    return LayerMap(tuple(layer for layer in whole if layer.name in kept))


def source(
    num_blocks: int, *, tied: bool = False, step: int | None = None, only: Iterable[str] | None = None
) -> SourceLayers:
    """A checkpoint; one that is partial has a configuration to tell so."""
    layers = layers_of(num_blocks, tied=tied, only=only)
    if only is None:
        return SourceLayers(layers=layers, step=step)
    return SourceLayers(layers=layers, step=step, num_blocks=num_blocks, is_tied=tied)


def resolve_text(text: str, sources: Mapping[str, SourceLayers]) -> Resolution:
    return resolve(parse_recipe(text.encode(), "merge.yaml"), sources)


def origins(resolution: Resolution) -> dict[str, tuple[str, str]]:
    """Target layer -> (source, layer there); for recipes that copy."""
    assert all(layer.is_copy for layer in resolution.layers)
    return {layer.name: (layer.contributions[0].source, layer.contributions[0].layer) for layer in resolution.layers}


def shares(resolution: Resolution, name: str) -> dict[str, float]:
    """Source -> weight in a layer of the target."""
    (layer,) = (layer for layer in resolution.layers if layer.name == name)
    return {each.source: each.weight for each in layer.contributions}
