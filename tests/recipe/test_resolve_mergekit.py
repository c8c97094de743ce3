"""mergekit's dialect against the layers of its checkpoints: positions, auxiliary layers, averages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.errors import IncompatibleError, IncompleteError, InvalidInputError, TailorError, UnsupportedError
from llmtailor.layers import map_names
from llmtailor.recipe import SourceLayers
from recipe.small_sources import layers_of, origins, resolve_text, shares, source

AUXILIARY = ("embed_tokens", "norm", "lm_head")
AB = {"a": source(4, step=100), "b": source(4, step=200)}


def write_slices(ranges: Iterable[tuple[str, int, int]], rest: str = "") -> str:
    rows = [f"  - sources: [{{model: {model}, layer_range: [{start}, {end}]}}]" for model, start, end in ranges]
    return "\n".join(["slices:", *rows, "merge_method: passthrough", rest])


# LLMTailor's own kind of recipe, as its create_yaml writes it: the parity merge of a 28-layer model.
def parity(old: str, new: str, *, tied: bool) -> str:
    def entry(model: str, start: int, end: int) -> str:
        return f"  - sources:\n      - model: {model}\n        layer_range: [{start}, {end}]\n"

    text = "slices:\n" + entry(old, 0, 0)
    text += "".join(entry(old if index % 2 else new, index, index + 1) for index in range(28))
    text += entry(old, 29, 29) if tied else entry(new, 29, 29) + entry(old, 30, 30)
    text += "\n\npost_weights:\n"
    text += "" if tied else f"  - name: lm_head.weight\n    model: {new}\n"
    text += f"  - name: model.norm.weight\n    model: {old}\n"
    text += f"\npre_weights:\n  - name: model.embed_tokens.weight\n    model: {old}\n"
    return text + "\nmerge_method: passthrough\ndtype: bfloat16"


@pytest.mark.parametrize("tied", [False, True])
def test_parity_recipe_of_llmtailor_runs_as_it_is(tied: bool) -> None:
    old, new = "runs/qwen/checkpoint-2", "runs/qwen/checkpoint-3"
    sources = {old: source(28, tied=tied, step=2), new: source(28, tied=tied, step=3)}
    resolution = resolve_text(parity(old, new, tied=tied), sources)
    expected = {f"layers.{index}": (old if index % 2 else new, f"layers.{index}") for index in range(28)}
    expected |= {"norm": (old, "norm"), "embed_tokens": (old, "embed_tokens")}
    expected |= {} if tied else {"lm_head": (new, "lm_head")}
    assert origins(resolution) == expected
    assert tuple(layer.name for layer in resolution.layers) == sources[old].layers.names
    assert (resolution.base, resolution.state_from, resolution.num_blocks) == (new, new, 28)
    assert resolution.output.dtype == "BF16"


def test_recipe_of_partial_checkpoints_runs_as_it_is() -> None:
    steps = {100: range(6, 9), 116: [], 151: range(4), 160: range(4, 6)}
    sources = {
        f"checkpoint-{step}": source(9, step=step, only=[f"layers.{index}" for index in blocks])
        for step, blocks in steps.items()
    }
    sources["checkpoint-100"] = source(9, step=100)
    sources["checkpoint-116"] = source(9, step=116, only=["norm", "lm_head"])
    ranges = [("checkpoint-116", 0, 0), ("checkpoint-151", 0, 4), ("checkpoint-160", 4, 6), ("checkpoint-100", 6, 9),
              ("checkpoint-116", 10, 10), ("checkpoint-100", 11, 11)]  # fmt: skip
    resolution = resolve_text(write_slices(ranges), sources)
    found = {name: path for name, (path, _) in origins(resolution).items()}
    assert found["norm"] == found["lm_head"] == "checkpoint-116"
    assert found["embed_tokens"] == found["layers.8"] == "checkpoint-100"
    assert (found["layers.3"], found["layers.5"]) == ("checkpoint-151", "checkpoint-160")
    assert resolution.state_from == "checkpoint-160"


@pytest.mark.parametrize(
    ("ranges", "rest", "expected"),
    [
        # Optimizer state is asked for alone, or the weights alone: the layer comes whole.
        ([("b", 0, 4), ("a", 0, 0), ("a", 5, 5), ("a", 6, 6)], "", "aaa"),
        ([("b", 0, 4), ("a", 0, 0), ("b", 5, 5), ("a", 6, 6)], "", "aab"),
        (
            [("b", 0, 4)],
            "pre_weights: [{name: model.embed_tokens.weight, model: a}]\n"
            "post_weights: [{name: model.norm.weight, model: b}, {name: lm_head.weight, model: a}]",
            "aba",
        ),
        ([("b", 0, 4), ("a", 0, 0)], "post_weights: [{name: lm_head.weight, model: a}]\nbase_model: b", "baa"),
        # None of LLMTailor's additions: as in mergekit, from the first slice and the last.
        ([("a", 0, 2), ("b", 2, 4)], "", "abb"),
        ([("b", 0, 1), ("a", 1, 4)], "base_model: a", "baa"),
        ([("b", 0, 4)], "", "bbb"),
    ],
)
def test_auxiliary_layers_come_from(ranges: list[tuple[str, int, int]], rest: str, expected: str) -> None:
    found = origins(resolve_text(write_slices(ranges, rest), AB))
    assert "".join(found[name][0] for name in AUXILIARY) == expected


def test_weights_and_optimizer_of_one_layer_from_different_checkpoints_are_refused_with_both_lines() -> None:
    text = write_slices(
        [("a", 0, 4), ("b", 6, 6), ("a", 0, 0), ("a", 5, 5)],
        "pre_weights:\n  - name: model.embed_tokens.weight\n    model: a",
    )
    with pytest.raises(InvalidInputError) as caught:
        resolve_text(text, AB)
    message = str(caught.value)
    assert (caught.value.kind, caught.value.layer) == ("auxiliary-twice", "embed_tokens")
    assert "$.slices[1].sources[0].layer_range (line 3, column 39)" in message
    assert "$.pre_weights[0].name (line 8, column 11)" in message


def test_same_checkpoint_for_weights_and_optimizer_is_no_conflict() -> None:
    rest = "post_weights: [{name: model.norm.weight, model: b}]\nbase_model: a"
    assert origins(resolve_text(write_slices([("a", 0, 4), ("b", 0, 0)], rest), AB))["norm"] == ("b", "norm")


def test_a_layer_of_several_tensors_comes_whole() -> None:
    names = [f"h.{index}.mlp.weight" for index in range(3)] + ["wte.weight", "ln_f.weight", "ln_f.bias"]
    sources = {path: SourceLayers(layers=map_names(dict.fromkeys(names, (4, 4)))) for path in "ab"}
    text = write_slices([("a", 0, 3), ("b", 0, 0)], "base_model: a")
    assert origins(resolve_text(text, sources))["ln_f"] == ("b", "ln_f")


def test_position_is_the_sum_of_the_lengths_before() -> None:
    ranges = [("a", 2, 4), ("b", 0, 3), ("a", 1, 2)]
    resolution = resolve_text(write_slices(ranges), AB)
    found = origins(resolution)
    blocks = [found[f"layers.{index}"] for index in range(6)]
    expected = [("a", 2), ("a", 3), ("b", 0), ("b", 1), ("b", 2), ("a", 1)]
    assert blocks == [(model, f"layers.{index}") for model, index in expected]
    assert resolution.num_blocks == 6
    assert [layer.name for layer in resolution.layers][0:2] == ["embed_tokens", "layers.0"]
    assert [layer.name for layer in resolution.layers][-2:] == ["norm", "lm_head"]


def test_sources_of_other_depths_may_be_sliced() -> None:
    resolution = resolve_text(write_slices([("a", 0, 4), ("x", 4, 6)]), {"a": AB["a"], "x": source(6)})
    assert (resolution.num_blocks, origins(resolution)["layers.5"]) == (6, ("x", "layers.5"))


def test_layers_may_be_dropped() -> None:
    resolution = resolve_text(write_slices([("a", 0, 1), ("a", 3, 4)]), AB)
    assert (resolution.num_blocks, origins(resolution)["layers.1"]) == (2, ("a", "layers.3"))


def test_other_stacks_come_from_the_base() -> None:
    names = [f"vision.blocks.{index}.mlp.weight" for index in range(2)]
    names += [f"text.layers.{index}.mlp.weight" for index in range(3)] + [
        "text.embed_tokens.weight",
        "text.norm.weight",
    ]
    sources = {path: SourceLayers(layers=map_names(dict.fromkeys(names, (4, 4)))) for path in "ab"}
    ranges = [("a", 0, 1), ("b", 1, 3)]
    found = origins(resolve_text(write_slices(ranges, "base_model: b"), sources))
    assert {found[name][0] for name in found if "blocks" in name} == {"b"}
    assert found["text.layers.0"] == ("a", "text.layers.0")
    with pytest.raises(IncompleteError) as caught:
        resolve_text(write_slices(ranges), sources)
    assert "vision.blocks.0-1" in str(caught.value)


def test_linear_of_models_averages_every_layer() -> None:
    text = """
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 3}}
merge_method: linear
"""
    resolution = resolve_text(text, AB)
    assert [shares(resolution, name) for name in AB["a"].layers.names] == [{"a": 0.25, "b": 0.75}] * 7
    assert {layer.optimizer_from.source for layer in resolution.layers} == {"b"}
    assert resolution.method == "linear"


def test_normalize_false_takes_weights_as_they_are() -> None:
    text = "models: [{model: a}, {model: b}]\nmerge_method: linear\nparameters: {weight: 2, normalize: false}"
    assert shares(resolve_text(text, AB), "norm") == {"a": 2.0, "b": 2.0}


def test_a_single_scaled_layer_is_no_copy() -> None:
    text = "models: [{model: a}]\nmerge_method: linear\nparameters: {weight: 0.5, normalize: false}"
    resolution = resolve_text(text, AB)
    assert not any(layer.is_copy for layer in resolution.layers)
    assert resolution.method == "linear"


def test_gradient_runs_from_the_first_layer_of_a_slice_to_its_last() -> None:
    text = """
slices:
  - sources:
      - {model: a, layer_range: [0, 3], parameters: {weight: [1, 0]}}
      - {model: b, layer_range: [1, 4], parameters: {weight: [0, 1]}}
merge_method: linear
"""
    resolution = resolve_text(text, AB)
    assert shares(resolution, "layers.0") == {"a": 1.0}
    assert shares(resolution, "layers.1") == {"a": 0.5, "b": 0.5}
    assert shares(resolution, "layers.2") == {"b": 1.0}
    # Embeddings are at the start of the first slice, norm and head at the end of the last.
    assert (shares(resolution, "embed_tokens"), shares(resolution, "lm_head")) == ({"a": 1.0}, {"b": 1.0})
    (middle,) = (layer for layer in resolution.layers if layer.name == "layers.1")
    assert [each.layer for each in middle.contributions] == ["layers.1", "layers.2"]


def test_filters_that_tell_layers_apart_are_followed() -> None:
    text = """
models:
  - {model: a, parameters: {weight: [{filter: lm_head, value: 3}, {filter: layers.2., value: 0}, {value: 1}]}}
  - {model: b}
merge_method: linear
parameters: {weight: 1}
"""
    resolution = resolve_text(text, AB)
    assert shares(resolution, "lm_head") == {"a": 0.75, "b": 0.25}
    assert shares(resolution, "layers.2") == {"b": 1.0}
    assert shares(resolution, "norm") == {"a": 0.5, "b": 0.5}


def test_filters_within_a_layer_are_left_to_mergekit() -> None:
    text = """
models:
  - {model: a, parameters: {weight: [{filter: mlp, value: 3}, {value: 1}]}}
  - {model: b, parameters: {weight: 1}}
merge_method: linear
"""
    with pytest.raises(UnsupportedError) as caught:
        resolve_text(text, AB)
    assert "filters give the tensors of layers.0 different weights" in str(caught.value)
    assert "pip install mergekit" in str(caught.value)


def test_what_needs_mergekit_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError) as caught:
        resolve_text("models: [{model: a}, {model: b}]\nmerge_method: ties\nbase_model: a", AB)
    assert caught.value.kind == "needs-mergekit"
    assert "merge_method ties" in caught.value.what
    assert "pip install mergekit" in str(caught.value)


def test_tokenizer_comes_from_where_the_recipe_says() -> None:
    text = write_slices([("a", 0, 4)], "base_model: b\n")
    assert resolve_text(text, AB).tokenizer_from is None
    assert resolve_text(f"{text}tokenizer_source: base", AB).tokenizer_from == "b"
    assert resolve_text(f"{text}tokenizer: {{source: t}}", AB).tokenizer_from == "t"


def test_base_model_gives_configuration_and_state() -> None:
    resolution = resolve_text(write_slices([("b", 0, 4)], "base_model: a"), AB)
    assert (resolution.base, resolution.state_from) == ("a", "a")


T5 = [f"{side}.block.{index}.layer.weight" for side in ("encoder", "decoder") for index in range(3)]
TIED_B = {"a": source(4), "b": source(4, tied=True)}
WRONG: list[tuple[str, Mapping[str, SourceLayers], type[TailorError], str, list[str]]] = [
    (
        write_slices([("a", 0, 2), ("b", 2, 5)]),
        AB,
        IncompatibleError,
        "layer-range-outside",
        ["$.slices[1].sources[0].layer_range (line 3", "within [0, 4]", "[2, 5]"],
    ),
    (
        write_slices([("a", 0, 10**15)]),
        AB,
        IncompatibleError,
        "recipe-faults",
        ["within [0, 4]", "too many layers"],
    ),
    (write_slices([("a", 0, 4)] * 2501), AB, IncompatibleError, "slice-coverage", ["1 to 10,000 layers", "10,004"]),
    (write_slices([("a", 0, 0)]), AB, IncompatibleError, "slice-coverage", ["the slices give no layer"]),
    (
        write_slices([("a", 0, 4), ("a", 3, 3)], "base_model: a"),
        AB,
        IncompatibleError,
        "zero-length-range",
        ["[0, 0] (norm), [5, 5] (head), [6, 6] (embedding)", "found     [3, 3]", "4 layers and is untied"],
    ),
    (
        write_slices([("a", 0, 4), ("a", 6, 6)], "base_model: a"),
        {"a": source(4, tied=True)},
        IncompatibleError,
        "zero-length-range",
        ["[5, 5] (embedding)", "is tied"],
    ),
    (
        write_slices([("a", 0, 3), ("b", 0, 0)], "base_model: a"),
        AB,
        IncompleteError,
        "slice-coverage",
        ["expected  4 layers", "found     3"],
    ),
    (
        write_slices([("a", 0, 4), ("b", 0, 0)]),
        AB,
        IncompleteError,
        "layers-missing",
        ["embed_tokens, lm_head", "base_model: PATH for the rest"],
    ),
    (
        write_slices([("a", 0, 4)], "pre_weights: [{name: model.embed.weight, model: b}]\nbase_model: a"),
        AB,
        IncompatibleError,
        "unknown-tensor",
        ["$.pre_weights[0].name", "did you mean model.embed_tokens.weight"],
    ),
    (
        write_slices([("a", 0, 4)], "post_weights: [{name: lm_head.weight, model: a}]"),
        {"a": source(4, tied=True)},
        IncompatibleError,
        "unknown-tensor",
        ["its head and embedding are tied: name the embedding"],
    ),
    (
        write_slices([("a", 0, 4)], "post_weights: [{name: model.layers.0.mlp.up_proj.weight, model: a}]"),
        AB,
        InvalidInputError,
        "not-auxiliary",
        ["belongs to the layer layers.0"],
    ),
    (
        write_slices([("a", 0, 2), ("x", 2, 4), ("a", 0, 0)], "base_model: a"),
        {"a": AB["a"], "x": source(4, only=["layers.2"])},
        IncompleteError,
        "layer-not-in-source",
        ["x does not have these layers", "no layers.3"],
    ),
    (
        write_slices([("a", 0, 2), ("x", 2, 4)]),
        {"a": AB["a"], "x": source(4, only=["layers.2", "layers.3", "norm"])},
        IncompleteError,
        "layer-not-in-source",
        ["x does not have the layer lm_head"],
    ),
    (write_slices([("a", 0, 2), ("b", 2, 4)]), TIED_B, IncompatibleError, "tied-untied", ["untied: a; tied: b"]),
    (
        "models: [{model: a}, {model: x}]\nparameters: {weight: 1}\nmerge_method: linear",
        {"a": AB["a"], "x": source(6)},
        IncompatibleError,
        "number-of-layers",
        ["4 in a; 6 in x"],
    ),
    (
        "models: [{model: a}, {model: b, parameters: {weight: [-1, 1]}}]\n"
        "merge_method: linear\nparameters: {weight: 1}",
        AB,
        InvalidInputError,
        "recipe-faults",
        ["the weights of layers.0 add up to 0"],
    ),
    (
        write_slices([("a", 0, 3)]),
        {"a": SourceLayers(layers=map_names(dict.fromkeys(T5, (4, 4))))},
        IncompatibleError,
        "ambiguous-stack",
        ["encoder.block and decoder.block", "name the layers instead"],
    ),
    (
        write_slices([("a", 0, 3)]),
        {"a": SourceLayers(layers=map_names({"fc.weight": (4, 4)}))},
        IncompatibleError,
        "ambiguous-stack",
        ["no stack of layers"],
    ),
    (
        write_slices([("a", 0, 2), ("x", 2, 4)], "base_model: a"),
        {"a": AB["a"], "x": SourceLayers(layers=map_names({"model.extra.weight": (1,), **dict.fromkeys(
            [fqn for layer in layers_of(4) for fqn in layer.fqns], (4, 4))}))},
        IncompatibleError,
        "other-layers",
        ["x has layers that a does not have", "extra"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "sources", "error", "kind", "said"), WRONG)
def test_recipe_that_does_not_fit_is_refused(
    text: str, sources: Mapping[str, SourceLayers], error: type[TailorError], kind: str, said: list[str]
) -> None:
    with pytest.raises(error) as caught:
        resolve_text(text, sources)
    message = str(caught.value)
    assert (type(caught.value), caught.value.kind, caught.value.path) == (error, kind, "merge.yaml"), message
    assert [part for part in said if part not in message] == [], message


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=6))
def test_slices_make_a_model_as_long_as_they_are(pieces: list[tuple[str, int, int]]) -> None:
    ranges = [(model, start, max(end, start + 1)) for model, start, end in pieces]
    resolution = resolve_text(write_slices(ranges), AB)
    flat = [(model, f"layers.{index}") for model, start, end in ranges for index in range(start, end)]
    found = origins(resolution)
    assert [found[f"layers.{index}"] for index in range(len(flat))] == flat
    assert (resolution.num_blocks, len(found)) == (len(flat), len(flat) + 3)


def test_recipe_of_35_sources_looks_at_each_once() -> None:
    class Counting(dict[str, SourceLayers]):
        num_reads = 0

        def __getitem__(self, path: str) -> SourceLayers:
            self.num_reads += 1
            return super().__getitem__(path)

    sources = Counting({f"run/checkpoint-{index}": source(126, step=index) for index in range(35)})
    ranges = [(f"run/checkpoint-{index % 35}", index, index + 1) for index in range(126)]
    resolution = resolve_text(write_slices(ranges), sources)
    assert (resolution.num_blocks, resolution.base) == (126, "run/checkpoint-34")
    assert sources.num_reads == 35
