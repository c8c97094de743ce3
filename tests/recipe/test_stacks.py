"""Models of several stacks, and blocks that a configuration does not count, in recipes of both dialects."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from llmtailor.errors import IncompatibleError, IncompleteError
from llmtailor.layers import map_names
from llmtailor.recipe import SourceLayers
from recipe.small_sources import origins, resolve_text, shares, source

LINEAR = "models: [{model: a, parameters: {weight: [1, 0]}}, {model: b, parameters: {weight: [0, 1]}}]"
LINEAR += "\nmerge_method: linear"


def with_vision(text: Sequence[int], vision: int, num_blocks: int | None = None) -> SourceLayers:
    """A model of text and images; its configuration counts the blocks of the text."""
    names = [f"vision.blocks.{index}.mlp.weight" for index in range(vision)]
    names += [f"text.layers.{index}.mlp.weight" for index in text]
    names += ["text.embed_tokens.weight", "text.norm.weight", "lm_head.weight"]
    return SourceLayers(layers=map_names(dict.fromkeys(names, (4, 4))), num_blocks=num_blocks or len(text))


def t5(encoder: int = 3, decoder: int = 3) -> SourceLayers:
    sides = {"encoder": encoder, "decoder": decoder}
    names = [f"{side}.block.{index}.layer.weight" for side, depth in sides.items() for index in range(depth)]
    names += ["shared.weight", "encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"]
    return SourceLayers(layers=map_names(dict.fromkeys(names, (4, 4))), num_blocks=encoder)


def with_uncounted(num_blocks: int) -> SourceLayers:
    """As hub models hold a block that predicts further tokens: numbered on after the others."""
    return SourceLayers(layers=source(num_blocks + 1).layers, num_blocks=num_blocks)


def cut(*ranges: tuple[str, int, int], rest: str = "") -> str:
    rows = [f"  - sources: [{{model: {model}, layer_range: [{start}, {end}]}}]" for model, start, end in ranges]
    return "\n".join(["slices:", *rows, "merge_method: passthrough", rest])


@pytest.mark.parametrize("vision", [2, 6])
def test_range_means_the_stack_that_the_configuration_counts(vision: int) -> None:
    sources = {"a": with_vision(range(4), vision)}
    resolution = resolve_text(cut(("a", 0, 2), ("a", 3, 4)), sources)

    assert (resolution.stack, resolution.num_blocks, resolution.new_depth) == ("text.layers", 3, 3)
    found = origins(resolution)
    assert found["text.layers.2"] == ("a", "text.layers.3")
    assert found[f"vision.blocks.{vision - 1}"] == ("a", f"vision.blocks.{vision - 1}")


def test_range_means_the_counted_stack_of_every_depth_and_of_partial_checkpoints_together() -> None:
    deeper = {"a": with_vision(range(4), 6), "x": with_vision(range(6), 6)}
    assert resolve_text(cut(("a", 0, 4), ("x", 4, 6), rest="base_model: a"), deeper).stack == "text.layers"
    partial = {"a": with_vision([0, 2], 3, num_blocks=4), "b": with_vision([1, 3], 3, num_blocks=4)}
    text = cut(("a", 0, 1), ("b", 1, 2), ("a", 2, 3), ("b", 3, 4), rest="base_model: a")
    resolution = resolve_text(text, partial)
    assert (resolution.stack, resolution.num_blocks, resolution.new_depth) == ("text.layers", 4, None)


def test_several_counted_stacks_are_refused_though_another_is_longer() -> None:
    names = [
        f"{part}.layers.{index}.mlp.weight" for part, depth in (("a", 4), ("b", 4), ("c", 6)) for index in range(depth)
    ]
    sources = {"a": SourceLayers(layers=map_names(dict.fromkeys(names, (4, 4))), num_blocks=4)}
    with pytest.raises(IncompatibleError) as caught:
        resolve_text(cut(("a", 0, 4)), sources)
    assert (caught.value.kind, caught.value.found) == ("ambiguous-stack", "a.layers and b.layers")


def test_longer_stack_is_not_taken_for_the_counted_one_that_is_held_in_part() -> None:
    sources = {"a": with_vision([0, 2], 6, num_blocks=4)}
    with pytest.raises(IncompatibleError) as caught:
        resolve_text(cut(("a", 0, 1)), sources)
    assert caught.value.kind == "ambiguous-stack"
    with_one_more = {"a": with_vision(range(5), 6, num_blocks=4)}
    assert resolve_text(cut(("a", 0, 4)), with_one_more).stack == "text.layers"


@pytest.mark.parametrize("vision", [2, 6])
def test_models_of_two_stacks_are_averaged_in_both(vision: int) -> None:
    sources = {path: with_vision(range(4), vision) for path in "ab"}
    resolution = resolve_text(LINEAR, sources)

    assert [layer.name for layer in resolution.layers] == list(sources["a"].layers.names)
    # Gradients run over each stack's own depth.
    for first, last in (("text.layers.0", "text.layers.3"), ("vision.blocks.0", f"vision.blocks.{vision - 1}")):
        assert (shares(resolution, first), shares(resolution, last)) == ({"a": 1.0}, {"b": 1.0})
    assert shares(resolution, "text.layers.1") == {"a": pytest.approx(2 / 3), "b": pytest.approx(1 / 3)}
    assert (resolution.stack, resolution.num_blocks, resolution.new_depth) == ("text.layers", 4, None)


def test_models_of_equal_stacks_need_no_main_one() -> None:
    resolution = resolve_text(LINEAR, {"a": t5(), "b": t5()})

    assert [layer.name for layer in resolution.layers] == list(t5().layers.names)
    assert shares(resolution, "encoder.block.1") == shares(resolution, "decoder.block.1") == {"a": 0.5, "b": 0.5}
    assert (resolution.stack, resolution.num_blocks) == (None, None)


def test_models_of_other_stacks_are_refused_by_the_layers_that_differ() -> None:
    with pytest.raises(IncompleteError) as caught:
        resolve_text(LINEAR, {"a": t5(decoder=3), "b": t5(decoder=2)})
    assert "b does not have these layers" in str(caught.value)
    assert "no decoder.block.2" in str(caught.value)


def test_models_without_a_stack_are_averaged() -> None:
    plain = SourceLayers(layers=map_names({"fc.weight": (4, 4), "out.weight": (4,)}))
    text = LINEAR.replace("[1, 0]", "1").replace("[0, 1]", "3")
    assert shares(resolve_text(text, {"a": plain, "b": plain}), "fc") == {"a": 0.25, "b": 0.75}


def test_models_keep_the_block_that_their_configurations_do_not_count() -> None:
    resolution = resolve_text(LINEAR, {"a": with_uncounted(3), "b": with_uncounted(3)})

    assert (resolution.num_blocks, resolution.new_depth) == (4, None)
    assert (shares(resolution, "layers.2"), shares(resolution, "layers.3")) == ({"b": 1.0}, {"b": 1.0})
    assert shares(resolution, "layers.1") == {"a": 0.5, "b": 0.5}


def test_models_that_all_lack_a_counted_block_are_refused() -> None:
    sources = {path: source(4, only=["embed_tokens", "layers.0", "layers.1", "norm", "lm_head"]) for path in "ab"}
    with pytest.raises(IncompleteError) as caught:
        resolve_text(LINEAR, sources)
    assert caught.value.kind == "recipe-faults"
    assert "no layers.2-3" in str(caught.value)


@pytest.mark.parametrize("text", [LINEAR, "layers: {'*': a}"])
def test_configuration_that_counts_without_end_is_refused(text: str) -> None:
    endless = SourceLayers(layers=source(4).layers, num_blocks=2**31 - 1)
    with pytest.raises((IncompatibleError, IncompleteError)):
        resolve_text(text, {"a": endless, "b": endless})


def test_slices_of_the_counted_blocks_make_no_model_of_another_depth() -> None:
    sources = {"a": with_uncounted(3)}
    assert resolve_text(cut(("a", 0, 3)), sources).new_depth is None
    assert resolve_text(cut(("a", 0, 2), ("a", 1, 3)), sources).new_depth == 4


def test_partial_base_is_as_deep_as_its_configuration_says() -> None:
    sources = {"a": source(4, step=1, only=["layers.0", "layers.1"]), "b": source(4, step=2, only=["layers.2"])}
    sources["c"] = source(4, step=0)
    text = cut(
        ("a", 0, 2),
        ("b", 2, 3),
        ("c", 3, 4),
        rest="pre_weights: [{name: model.embed_tokens.weight, model: c}]\n"
        "post_weights: [{name: model.norm.weight, model: c}, {name: lm_head.weight, model: c}]",
    )
    resolution = resolve_text(text, sources)
    assert (resolution.base, resolution.new_depth) == ("b", None)
    silent = {**sources, "b": SourceLayers(layers=sources["b"].layers, step=2)}
    assert resolve_text(text, silent).new_depth is None


def test_named_layers_without_one_that_the_configuration_counts_are_refused() -> None:
    sources = {
        "a": source(4, step=1, only=["embed_tokens", "layers.0", "layers.1"]),
        "b": source(4, step=2, only=["layers.2", "norm", "lm_head"]),
    }
    with pytest.raises(IncompleteError) as caught:
        resolve_text('layers: {"embed_tokens, layers.0-1": a, "layers.2, norm, lm_head": b}', sources)
    assert (caught.value.kind, caught.value.layer) == ("layers-missing", "layers.3")
