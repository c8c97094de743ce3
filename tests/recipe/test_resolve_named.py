"""Our own dialect against the layers of its checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.errors import IncompatibleError, IncompleteError, InvalidInputError, TailorError
from llmtailor.recipe import SourceLayers, parse_recipe, resolve, sources_of, whole_checkpoint
from recipe.small_sources import layers_of, origins, resolve_text, shares, source

A, B, C = source(4, step=100), source(4, step=300), source(4, step=200)
ABC = {"a": A, "b": B, "c": C}


def test_named_layers_come_from_their_entries_and_the_rest_from_base() -> None:
    resolution = resolve_text('base: a\nlayers: {"layers.1-2, norm": b, lm_head: c}', ABC)
    assert origins(resolution) == {
        "embed_tokens": ("a", "embed_tokens"),
        "layers.0": ("a", "layers.0"),
        "layers.1": ("b", "layers.1"),
        "layers.2": ("b", "layers.2"),
        "layers.3": ("a", "layers.3"),
        "norm": ("b", "norm"),
        "lm_head": ("c", "lm_head"),
    }
    assert [layer.name for layer in resolution.layers] == list(A.layers.names)
    assert (resolution.base, resolution.state_from, resolution.method) == ("a", "a", "passthrough")
    assert (resolution.stack, resolution.num_blocks, resolution.tokenizer_from) == ("layers", 4, None)


def test_state_comes_from_where_the_recipe_says() -> None:
    resolution = resolve_text("base: a\nstate_from: c", ABC)
    assert (resolution.base, resolution.state_from) == ("a", "c")


def test_without_base_state_and_configuration_come_from_the_newest() -> None:
    resolution = resolve_text('layers: {"layers.*": a, "[!l]*": b, "lm_head": c}', ABC)
    assert (resolution.base, resolution.state_from) == ("b", "b")


def test_newest_of_unknown_steps_is_the_first() -> None:
    sources = {"x": source(2), "y": source(2)}
    assert resolve_text('layers: {"layers.*": y, "norm, embed_tokens, lm_head": x}', sources).state_from == "y"


def test_average_of_layers_has_weights_that_add_up_to_1() -> None:
    resolution = resolve_text("base: a\nlayers: {norm: {from: [b, c], weights: [3, 1]}, lm_head: {from: [b, c]}}", ABC)
    assert shares(resolution, "norm") == {"b": 0.75, "c": 0.25}
    assert shares(resolution, "lm_head") == {"b": 0.5, "c": 0.5}
    assert resolution.method == "linear"


def test_moments_of_an_average_come_from_the_newest_that_counts() -> None:
    text = "base: a\nlayers: {norm: {from: [c, b, a], weights: [1, 1, 1]}, lm_head: {from: [c, b], weights: [1, 0]}}"
    layers = {layer.name: layer for layer in resolve_text(text, ABC).layers}
    assert layers["norm"].optimizer_from.source == "b"
    assert layers["lm_head"].optimizer_from.source == "c"
    assert layers["lm_head"].is_copy


def test_newest_goes_by_the_step_of_the_layer() -> None:
    stale = SourceLayers(layers=layers_of(4), step=300, layer_steps={"norm": 10})
    resolution = resolve_text("base: a\nlayers: {'norm, lm_head': {from: [s, a]}}", {"a": A, "s": stale})
    newest = {layer.name: layer.optimizer_from.source for layer in resolution.layers}
    assert (newest["norm"], newest["lm_head"]) == ("a", "s")


def test_weights_of_one_source_do_not_scale_it() -> None:
    resolution = resolve_text("base: a\nlayers: {norm: {from: [b], weights: [0.7]}}", ABC)
    assert shares(resolution, "norm") == {"b": 1.0}


def test_partial_checkpoints_add_up_in_model_order() -> None:
    sources = {
        "x": source(4, step=1, only=["layers.3", "layers.1", "lm_head"]),
        "y": source(4, step=2, only=["norm", "layers.0", "layers.2", "embed_tokens", "layers.1"]),
    }
    text = "layers: {'layers.1, layers.3, lm_head': x, 'layers.0, layers.2, norm, embed_tokens': y}"
    resolution = resolve_text(text, sources)
    blocks = [layer.name for layer in resolution.layers if layer.name.startswith("layers")]
    assert blocks == ["layers.0", "layers.1", "layers.2", "layers.3"]
    assert origins(resolution)["layers.1"] == ("x", "layers.1")
    assert (resolution.num_blocks, resolution.state_from) == (4, "y")


def test_whole_checkpoint_is_what_a_recipe_of_base_alone_comes_to() -> None:
    whole, resolution = whole_checkpoint("a", A.layers), resolve_text("base: a", ABC)
    assert whole.layers == resolution.layers
    assert (whole.base, whole.state_from, whole.method, whole.output) == ("a", "a", "passthrough", resolution.output)


WRONG: list[tuple[str, Mapping[str, SourceLayers], type[TailorError], str, list[str]]] = [
    (
        "base: a\nlayers: {lm_haed: b}",
        ABC,
        IncompatibleError,
        "unknown-layer",
        ["$.layers.lm_haed (line 2, column 10)", "did you mean lm_head?", "embed_tokens, layers.0-3, norm, lm_head"],
    ),
    ("base: a\nlayers: {'*.7': b}", ABC, IncompatibleError, "unknown-layer", ["'*.7'"]),
    ("base: a\nlayers: {layer.0-3: b}", ABC, IncompatibleError, "unknown-layer", ["did you mean layers.0"]),
    ("base: a\nlayers: {layers.2-9: b}", ABC, IncompatibleError, "unknown-layer", ["found     layers.2-3"]),
    ("base: a\nlayers: {layers.2-999999999: b}", ABC, IncompatibleError, "unknown-layer", ["found     layers.2-3"]),
    (
        "base: a\nlayers:\n  layers.*: b\n  'layers.2, norm': c",
        ABC,
        InvalidInputError,
        "layer-twice",
        ["'layers.*' and 'layers.2, norm'", "(line 4, column 3)", "layers.2 here and at", "(line 3, column 3)"],
    ),
    (
        "layers: {layers.*: a, norm: b}",
        ABC,
        IncompleteError,
        "layers-missing",
        ["found     embed_tokens, lm_head", "base: PATH for the rest"],
    ),
    (
        "base: a\nlayers: {norm: x}",
        {"a": A, "x": source(4, only=["layers.1"])},
        IncompleteError,
        "layer-not-in-source",
        ["$.layers.norm", "x does not have these layers", "no norm"],
    ),
    (
        "base: a\nlayers: {norm: x}",
        {"a": A, "x": source(4, tied=True)},
        IncompatibleError,
        "tied-untied",
        ["untied: a; tied: x", "all tied, or all untied"],
    ),
    (
        "base: x\nlayers: {norm: a}",
        {"a": A, "x": source(4, tied=True)},
        IncompatibleError,
        "tied-untied",
        ["tied: x; untied: a"],
    ),
    (
        "base: a\nlayers: {norm: x}",
        {"a": A, "x": source(6)},
        IncompatibleError,
        "number-of-layers",
        ["4 in a; 6 in x", "layer_range makes a model of another depth"],
    ),
    (
        "base: a\nlayers: {norm: x}",
        {"a": A, "x": source(3)},
        IncompatibleError,
        "number-of-layers",
        ["4 in a; 3 in x"],
    ),
    (
        "base: a\nlayers: {norm: x}",
        {"a": A, "x": SourceLayers(layers=layers_of(4, stack="blocks"))},
        IncompatibleError,
        "other-layers",
        ["x has layers that a does not have", "blocks.0-3"],
    ),
]


@pytest.mark.parametrize(("text", "sources", "error", "kind", "said"), WRONG)
def test_recipe_that_does_not_fit_is_refused(
    text: str, sources: Mapping[str, SourceLayers], error: type[TailorError], kind: str, said: list[str]
) -> None:
    with pytest.raises(error) as caught:
        resolve_text(text, sources)
    message = str(caught.value)
    assert (type(caught.value), caught.value.kind, caught.value.path) == (error, kind, "merge.yaml"), message
    assert [part for part in said if part not in message] == [], message


def test_all_misfits_are_reported_together_as_the_gravest_class() -> None:
    text = "layers: {layers.0-1: a, layers.1: b, nrom: b, lm_head: x}"
    with pytest.raises(InvalidInputError) as caught:
        resolve_text(text, {**ABC, "x": source(4, only=["norm"])})
    message = str(caught.value)
    assert caught.value.kind == "recipe-faults"
    for part in ("take the same layers", "no layer 'nrom'", "x does not have", "layers have no source"):
        assert part in message


def test_misfits_without_wrong_wording_are_incompatible() -> None:
    with pytest.raises(IncompatibleError) as caught:
        resolve_text("layers: {nrom: a}", ABC)
    assert (type(caught.value), caught.value.kind) == (IncompatibleError, "recipe-faults")


def test_missing_layers_alone_are_incomplete() -> None:
    sources = {"x": source(4, only=["norm"]), "y": source(4, only=["layers.0", "layers.1"])}
    with pytest.raises(IncompleteError) as caught:
        resolve_text("layers: {norm: y, layers.0: x}", sources)
    assert (type(caught.value), caught.value.kind) == (IncompleteError, "recipe-faults")


PATTERNS = st.lists(
    st.sampled_from(
        ["norm", "lm_head", "layers.0-1", "layers.3", "layers.*", "*", "embed*", "layers.9", "x,", "layers.3-1"]
    ),
    min_size=1,
    max_size=3,
).map(", ".join)


@given(st.none() | st.sampled_from("abc"), st.dictionaries(PATTERNS, st.sampled_from("abc"), max_size=3))
def test_every_layer_has_one_source_or_the_recipe_is_refused(base: str | None, entries: dict[str, str]) -> None:
    lines = [] if base is None else [f"base: {base}"]
    lines += [f"layers: {{{', '.join(f'{key!r}: {path}' for key, path in entries.items())}}}"] if entries else []
    with contextlib.suppress(InvalidInputError, IncompatibleError):
        recipe = parse_recipe("\n".join(lines).encode(), "r.yaml")
        found = origins(resolve(recipe, ABC))
        assert tuple(found) == A.layers.names
        assert {path for path, _ in found.values()} <= set(sources_of(recipe))
        assert all(name == there for name, (_, there) in found.items())
