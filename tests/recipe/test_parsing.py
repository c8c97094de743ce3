"""What recipes of both dialects say, and every way to write one wrong."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.errors import InvalidInputError
from llmtailor.recipe import MergekitRecipe, NamedRecipe, Output, Recipe, parse_recipe, sources_of
from llmtailor.recipe.named import parse_size


def parse(text: str) -> Recipe:
    return parse_recipe(text.encode(), "merge.yaml")


def parse_named(text: str) -> NamedRecipe:
    recipe = parse(text)
    assert isinstance(recipe, NamedRecipe)
    return recipe


def parse_mergekit(text: str) -> MergekitRecipe:
    recipe = parse(text)
    assert isinstance(recipe, MergekitRecipe)
    return recipe


def test_named_recipe_is_read() -> None:
    recipe = parse_named(
        """
        base: runs/a/checkpoint-300
        layers:
          "layers.0-15, norm": runs/a/checkpoint-200
          lm_head: {from: [runs/a/checkpoint-200, runs/b], weights: [3, 1]}
          embed_tokens: {from: [runs/c]}
        state_from: runs/d
        output: {format: hf, dtype: bfloat16, shard_size: 5GB, weights_only: true}
        """
    )
    assert recipe.base == "runs/a/checkpoint-300"
    assert [choice.patterns for choice in recipe.choices] == [("layers.0-15", "norm"), ("lm_head",), ("embed_tokens",)]
    assert [choice.weights for choice in recipe.choices] == [(1.0,), (3.0, 1.0), (1.0,)]
    assert recipe.state_from == "runs/d"
    assert (recipe.output.format, recipe.output.dtype, recipe.output.shard_nbytes) == ("hf", "BF16", 5 * 10**9)
    assert recipe.output.weights_only
    assert sources_of(recipe) == ("runs/a/checkpoint-300", "runs/a/checkpoint-200", "runs/b", "runs/c", "runs/d")


def test_base_alone_is_a_recipe() -> None:
    recipe = parse_named("base: a\nstate_from:\n")
    assert (recipe.base, recipe.choices, recipe.state_from, recipe.output) == ("a", (), None, Output())


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 5 * 10**8),
        ("2GiB", 2 * 2**30),
        ("4.7 GB", 4_700_000_000),
        ("0.5TB", 5 * 10**11),
        ("7000000B", 7 * 10**6),
        ("1kB", 1000),
        ("5", None),
        ("5B00", None),
        ("-5GB", None),
        ("5 iB", None),
        ("1e3GB", None),
        ("", None),
    ],
)
def test_parse_size_reads_decimal_and_binary_units(text: str, nbytes: int | None) -> None:
    assert parse_size(text) == nbytes


def test_mergekit_recipe_is_read() -> None:
    recipe = parse_mergekit(
        """
        slices:
          - sources:
              - model: a
                layer_range: [0, 0]
          - sources: [{model: a, layer_range: [0, 16]}]
          - sources: [{model: b, layer_range: [16, 32]}]
        pre_weights: [{name: model.embed_tokens.weight, model: b}]
        post_weights: [{name: lm_head.weight, model: c}]
        merge_method: passthrough
        base_model: d
        dtype: float32
        out_dtype: torch.bfloat16
        tokenizer_source: e
        """
    )
    ranges = [(source.model, source.start, source.end) for each in recipe.slices for source in each.sources]
    assert ranges == [("a", 0, 0), ("a", 0, 16), ("b", 16, 32)]
    assert (recipe.method, recipe.base_model, recipe.tokenizer) == ("passthrough", "d", "e")
    assert recipe.output.dtype == "BF16"
    assert recipe.needs_mergekit is None
    assert sources_of(recipe) == ("d", "a", "b", "c")


def test_tokenizer_of_a_source_is_no_further_source() -> None:
    text = "models: [{model: a}]\nmerge_method: passthrough\ntokenizer: {source: a}\n"
    assert sources_of(parse(text)) == ("a",)


SLERP = """
slices:
  - sources:
      - {model: a, layer_range: [0, 32]}
      - {model: b, layer_range: [0, 32]}
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - value: 0.5
  int8_mask: true
"""
TIES = """
models:
  - model: a
  - {model: b, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
merge_method: ties
base_model: a
parameters: {normalize: true}
dtype: float16
"""
MODULES = """
modules:
  text: {slices: [{sources: [{model: a, layer_range: [0, 4]}]}]}
  vision: {models: [{model: b}]}
merge_method: passthrough
"""
SCALED = """
slices:
  - sources: [{model: a, layer_range: [0, 4], parameters: {scale: [{filter: o_proj, value: 0.0}, {value: 1.0}]}}]
merge_method: passthrough
"""
ONE = "models: [{model: a}]\nmerge_method: passthrough\n"


@pytest.mark.parametrize(
    ("text", "needs", "models"),
    [
        (SLERP, "merge_method slerp", ("a", "b")),
        (TIES, "merge_method ties", ("a", "b")),
        (MODULES, "modules", ("a", "b")),
        (SCALED, "parameter scale", ("a",)),
        (ONE + "tokenizer_source: union", "tokenizer_source union", ("a",)),
        (ONE + "tokenizer: {source: base, tokens: {<s>: {source: b}}}", "tokenizer.tokens", ("a",)),
        (ONE + "tokenizer: {source: base, pad_to_multiple_of: 8}", "tokenizer.pad_to_multiple_of", ("a",)),
        (ONE + "tokenizer: {}", "tokenizer.source union", ("a",)),
        (ONE + "chat_template: auto", "chat_template", ("a",)),
        (
            "slices: [{sources: [{model: a, layer_range: [0, 4]}], residual_weight: 0.1}]\nmerge_method: passthrough",
            "residual_weight of a slice",
            ("a",),
        ),
    ],
)
def test_what_only_mergekit_does_is_recorded(text: str, needs: str, models: tuple[str, ...]) -> None:
    recipe = parse_mergekit(text)
    assert recipe.needs_mergekit == needs
    assert sources_of(recipe) == models


def test_every_example_of_the_documentation_is_a_recipe() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    examples = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    recipes = [parse(text) for text in examples]
    assert [type(recipe) for recipe in recipes] == [NamedRecipe, MergekitRecipe, MergekitRecipe, NamedRecipe]


# Document -> kind, and what must stand in the message: the place, the accepted form.
ONE_SLICE = "merge_method: passthrough\nslices:\n  - sources: "
WRONG = [
    ("", "dialect", ["$ (line 1", "slices: and merge_method:", "base: and layers:", "nothing"]),
    ("- a\n", "dialect", ["$ (line 1, column 1)", "something else"]),
    ("{}", "dialect", ["an empty mapping"]),
    ("layer: {norm: a}", "dialect", ["the key 'layer'", "did you mean layers?"]),
    ("base: a\nslices: []", "dialect", ["$.base (line 1, column 1)", "base beside slices"]),
    # our own
    ("base: a\nlayrs: {}\nstate_from: b", "unknown-key", ["$.layrs (line 2, column 1)", "did you mean layers?"]),
    ("state_from: a", "missing-key", ["neither 'base' nor 'layers'", "layers: {PATTERNS: PATH}"]),
    ("base: 160", "type", ["$.base (line 1, column 7)", "in quotes", "found     160"]),
    ("base: true", "type", ["found     true"]),
    ("base: [a]", "type", ["a list of 1"]),
    ("base: ''", "text", ["$.base", "not empty"]),
    ('base: "a\\nb"', "text", ["one line of text"]),
    (f"base: {'x' * 5000}", "text", ["at most 4096 characters"]),
    ("layers: [norm]", "type", ["$.layers (line 1, column 9)", 'layers: {"layers.0-15, norm": PATH']),
    ("base: a\nlayers: {}", "type", ["$.layers"]),
    ("layers: {norm: 5}", "type", ["$.layers.norm", "a path, or {from: [PATH, PATH]"]),
    ("layers: {norm: }", "type", ["$.layers.norm", "found     nothing"]),
    ("layers: {'norm,': a}", "pattern", ['$.layers["norm,"]', "a comma without a layer"]),
    ("layers: {'': a}", "pattern", ['$.layers[""]', "a layer without a name"]),
    ("layers: {layers.5-2: a}", "pattern", ["ends before it starts", "expected  layers.2-5"]),
    ("layers: {norm: {form: [a]}}", "recipe-faults", ["$.layers.norm.form", "did you mean from?", "'from' is missing"]),
    ("layers: {norm: {from: []}}", "type", ["$.layers.norm.from", "an empty list"]),
    ("layers: {norm: {from: [a, a]}}", "source-twice", ["each path once"]),
    ("layers: {norm: {from: [a, b], weights: [1]}}", "weights", ["$.layers.norm.weights", "2 numbers", "found     1"]),
    ("layers: {norm: {from: [a, b], weights: [1, -1]}}", "weights", ["add up to 0"]),
    ("layers: {norm: {from: [a, b], weights: [x, 1]}}", "type", ["$.layers.norm.weights[0]", "expected a number"]),
    ("base: a\noutput: {format: gguf}", "unknown-value", ["$.output.format", "hf, tailored, deepspeed, dcp"]),
    ("base: a\noutput: {format: deepsped}", "unknown-value", ["did you mean deepspeed?"]),
    ("base: a\noutput: {dtype: bf16}", "unknown-value", ["bfloat16, float16, float32", "'bf16'"]),
    ("base: a\noutput: {shard_size: 5}", "size", ["$.output.shard_size", "5GB"]),
    ("base: a\noutput: {shard_size: 5B}", "size", ["at least 1 MB"]),
    ("base: a\noutput: {weights_only: yes}", "type", ["$.output.weights_only", "true or false", "'yes'"]),
    ("base: a\noutput: hf", "type", ["$.output", "expected a mapping"]),
    # mergekit's
    ("slices: [{sources: [{model: a, layer_range: [0, 4]}]}]", "missing-key", ["'merge_method' is missing"]),
    ("merge_method: passthrough", "content", ["exactly one of slices, models and modules", "none of them"]),
    (f"{ONE}slices: [{{sources: [{{model: a, layer_range: [0, 4]}}]}}]", "content", ["slices and models"]),
    ("merge_method: passthrough\nslices: {}", "type", ["$.slices (line 2, column 9)", "sources: [{model: PATH"]),
    ("merge_method: passthrough\nslices: []", "type", ["an empty list"]),
    (f"{ONE_SLICE}[]", "type", ["$.slices[0].sources (line 3, column 14)"]),
    (f"{ONE_SLICE}[{{model: a, range: [0, 1]}}]", "recipe-faults", ["$.slices[0].sources[0].range", "layer_range"]),
    (f"{ONE_SLICE}[{{model: a, layer_range: 0-4}}]", "layer-range", ["[FIRST, END]", "'0-4'"]),
    (f"{ONE_SLICE}[{{model: a, layer_range: [0, 4, 8]}}]", "layer-range", ["a list of 3"]),
    (f"{ONE_SLICE}[{{model: a, layer_range: [0, x]}}]", "type", ["$.slices[0].sources[0].layer_range[1]", "'x'"]),
    (f"{ONE_SLICE}[{{model: a, layer_range: [-1, 4]}}]", "type", ["layer_range[0]", "0 or more"]),
    (f"{ONE_SLICE}[{{model: a, layer_range: [010, 16]}}]", "type", ["layer_range[0]", "'010'"]),
    (f"{ONE_SLICE}[{{model: a, layer_range: [0, true]}}]", "type", ["layer_range[1]"]),
    (f"{ONE_SLICE}[{{model: a, layer_range: [0, 1.5]}}]", "type", ["layer_range[1]"]),
    (f"{ONE_SLICE}[{{model: a, layer_range: [4, 0]}}]", "layer-range", ["ends before it starts", "[0, 4]"]),
    (f"{ONE_SLICE}[{{model: {{path: a}}, layer_range: [0, 4]}}]", "type", ["$.slices[0].sources[0].model"]),
    (
        f"{ONE_SLICE}[{{model: a, layer_range: [0, 4]}}, {{model: b, layer_range: [0, 4]}}]",
        "one-source",
        ["$.slices[0].sources[1]", "merge_method linear with weights"],
    ),
    ("merge_method: passthrough\nmodels: [{model: a}, {model: b}]", "one-source", ["$.models[1]", "2 models"]),
    ("merge_method: linear\nmodels: [{model: a}, {model: b}]", "recipe-faults", ["$.models[1]", "weight: 0.5"]),
    (
        "merge_method: linear\nmodels:\n"
        "  - {model: a, parameters: {weight: 1}}\n"
        "  - {model: b, parameters: {weight: [{filter: mlp, value: 1}]}}",
        "missing-weight",
        ["$.models[1] (line 4", "none for the rest"],
    ),
    (
        "merge_method: linear\n"
        "slices: [{sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 3]}]}]\n"
        "parameters: {weight: 1}",
        "slice-lengths",
        ["$.slices[0].sources[1].layer_range", "4 layers"],
    ),
    (
        "merge_method: linear\n"
        "slices: [{sources: [{model: a, layer_range: [0, 0]}, {model: b, layer_range: [0, 0]}]}]\n"
        "parameters: {weight: 1}",
        "one-source",
        ["names an auxiliary layer"],
    ),
    (
        "merge_method: linear\nmodels: [{model: a, parameters: {weigh: 1}}]",
        "unknown-parameter",
        ["$.models[0].parameters.weigh", "did you mean weight?"],
    ),
    (
        "merge_method: linear\nmodels: [{model: a, parameters: {normalize: true}}]",
        "unknown-parameter",
        ["no parameter 'normalize' here"],
    ),
    (f"{ONE}parameters: {{weight: 1}}", "unknown-parameter", ["passthrough has no parameter 'weight'"]),
    (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: heavy}}]",
        "type",
        ["$.models[0].parameters.weight", "expected a number"],
    ),
    (
        f"merge_method: linear\nmodels: [{{model: a}}]\nparameters: {{weight: [{'{value: 1}, ' * 101}]}}",
        "size",
        ["$.parameters.weight", "at most 100"],
    ),
    (f"{ONE}parameters: [x]", "type", ["$.parameters", "parameters: {NAME: VALUE}"]),
    (f"{SLERP}  x: [[1]]", "type", ["$.parameters.x[0]", "a list of values"]),
    (f"{ONE}pre_weights: [{{name: model.norm.weight}}]", "missing-key", ["$.pre_weights[0]", "'model' is missing"]),
    (f"{ONE}post_weights: {{name: a, model: b}}", "type", ["$.post_weights", "- {name: model.norm.weight"]),
    (f"{ONE}dtype: int4", "unknown-value", ["$.dtype", "bfloat16, float16, float32"]),
    (f"{ONE}base_model: [x]", "type", ["$.base_model"]),
    (f"{ONE}merge_methods: x", "unknown-key", ["$.merge_methods (line 3", "did you mean merge_method?"]),
    (f"{ONE}tokenizer: {{source: base}}\ntokenizer_source: base", "tokenizer", ["the other is on line 4"]),
    (f"{ONE}tokenizer: base", "type", ["$.tokenizer", "tokenizer: {source: base}"]),
    (f"{ONE}chat_template: 3", "type", ["$.chat_template"]),
    ("modules: []\nmerge_method: passthrough", "type", ["$.modules", "{NAME: {slices: [...]}}"]),
    ("modules: {x: {}}\nmerge_method: passthrough", "content", ["$.modules.x"]),
]


@pytest.mark.parametrize(("text", "kind", "said"), WRONG)
def test_wrong_recipe_is_refused_with_place_and_accepted_form(text: str, kind: str, said: list[str]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse(text)
    message = str(caught.value)
    assert (caught.value.kind, caught.value.path) == (kind, "merge.yaml"), message
    assert [part for part in said if part not in message] == [], message


def test_a_directory_called_no_is_a_path() -> None:
    assert parse_named("base: no").base == "no"


def test_all_faults_are_reported_together() -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse("bse: a\nlayers: {layers.5-2: 3, norm: }\nstate_from: 4\noutput: {dtype: x, size: 1}\n")
    message = str(caught.value)
    assert caught.value.kind == "recipe-faults"
    assert caught.value.what == "the recipe is wrong in 7 places"
    for place in (
        "$.bse",
        '$.layers["layers.5-2"]',
        "$.layers.norm",
        "$.state_from",
        "$.output.dtype",
        "$.output.size",
    ):
        assert f"{place} (line " in message


def test_a_long_list_of_faults_is_cut_off() -> None:
    text = "base: a\n" + "".join(f"key{i}: 1\n" for i in range(2000))
    with pytest.raises(InvalidInputError) as caught:
        parse(text)
    assert "in 2000 places" in caught.value.what
    assert "... and 1975 more" in str(caught.value)
    assert len(str(caught.value)) < 10_000


def test_more_patterns_than_anybody_needs_are_refused() -> None:
    key = ",".join(["a"] * 10_001)
    with pytest.raises(InvalidInputError, match="too many"):
        parse(f"layers:\n  ? '{key}'\n  : x\n")


KEYS = st.sampled_from(
    ["base", "layers", "state_from", "output", "slices", "sources", "model", "layer_range", "models", "modules",
     "merge_method", "parameters", "weight", "filter", "value", "from", "weights", "pre_weights", "name", "dtype",
     "tokenizer", "source", "x"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats(-1, 1).map(lambda x: round(x, 3))
    | st.sampled_from(["a", "passthrough", "linear", "slerp", "hf", "norm", "''"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def flow(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    if value is None:
        return "~"
    return str(value).lower() if isinstance(value, bool) else str(value)


@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_parse_recipe_raises_nothing_else(document: dict[str, object]) -> None:
    with contextlib.suppress(InvalidInputError):
        recipe = parse(flow(document))
        assert all(isinstance(path, str) and path for path in sources_of(recipe))
