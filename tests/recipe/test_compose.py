"""Recipes that write themselves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.errors import IncompleteError, InvalidInputError
from llmtailor.layers import Layer, LayerKind, LayerMap
from llmtailor.recipe import (
    SavedLayers,
    SourceLayers,
    choose_newest,
    compose_recipe,
    flags_to_layers,
    parse_recipe,
    read_flags,
    resolve,
    sources_of,
)
from recipe.small_sources import layers_of, origins

LAYERS = layers_of(4).names


def save(step: int, *layers: str) -> SavedLayers:
    return SavedLayers(path=f"run/checkpoint-{step}", step=step, layers=layers)


PARITY = [
    save(100, *LAYERS),
    save(150, "layers.1", "layers.3", "embed_tokens", "norm"),
    save(160, "layers.0", "layers.2", "lm_head", "norm"),
    save(170, "layers.1"),
]


def test_recipe_takes_the_newest_version_at_or_before_the_step() -> None:
    text = compose_recipe(PARITY, layers=LAYERS, step=160)
    assert text == (
        "# The newest version of each layer at or before step 160.\n"
        'state_from: "run/checkpoint-160"\n'
        "layers:\n"
        "  # step 160: 4 layers\n"
        '  "layers.0, layers.2, norm, lm_head": "run/checkpoint-160"\n'
        "  # step 150, 10 steps old: 3 layers\n"
        '  "embed_tokens, layers.1, layers.3": "run/checkpoint-150"\n'
    )


def test_layers_that_nobody_saved_come_from_the_default() -> None:
    text = compose_recipe(PARITY[1:], layers=LAYERS, step=159, default="base/checkpoint-9")
    assert text == (
        "# The newest version of each layer at or before step 159.\n"
        'base: "base/checkpoint-9"  # 3 layers\n'
        'state_from: "run/checkpoint-150"\n'
        "layers:\n"
        "  # step 150, 9 steps old: 4 layers\n"
        '  "embed_tokens, layers.1, layers.3, norm": "run/checkpoint-150"\n'
    )


def test_without_a_save_all_comes_from_the_default() -> None:
    text = compose_recipe(PARITY, layers=LAYERS, step=99, default="x")
    recipe = parse_recipe(text.encode(), "r.yaml")
    assert sources_of(recipe) == ("x",)
    assert origins(resolve(recipe, {"x": SourceLayers(layers=layers_of(4))}))["norm"] == ("x", "norm")


def test_layers_without_any_source_are_listed() -> None:
    with pytest.raises(IncompleteError) as caught:
        compose_recipe(PARITY[1:], layers=LAYERS, step=155)
    assert caught.value.kind == "layers-missing"
    assert caught.value.found == "layers.0, layers.2, lm_head"
    assert "step 155" in caught.value.what


def test_of_equal_steps_the_last_given_counts() -> None:
    first, second = (SavedLayers(path=path, step=5, layers=("norm",)) for path in ("a", "b"))
    assert choose_newest([first, second], layers=["norm"], step=5) == {"norm": second}


def test_a_save_of_nothing_gives_no_state() -> None:
    assert "checkpoint-165" not in compose_recipe([*PARITY, save(165)], layers=LAYERS, step=166)


def test_long_lists_are_cut_into_lines_that_yaml_reads() -> None:
    names = [f"layers.{index}" for index in range(400)]
    saves = [save(1, *names), save(2, *names[::2], "x" * 3000)]
    text = compose_recipe(saves, layers=[*names, "x" * 3000], step=2)
    assert max(len(line) for line in text.splitlines() if "xxx" not in line) < 160
    recipe = parse_recipe(text.encode(), "r.yaml")
    assert sources_of(recipe) == ("run/checkpoint-2", "run/checkpoint-1")


@pytest.mark.parametrize("path", ["a\nb", "a\x00", "\x1b[2J", "\udcff", "", "  "])
def test_path_that_yaml_cannot_hold_is_refused(path: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        compose_recipe([SavedLayers(path=path, step=1, layers=("norm",))], layers=["norm"], step=1)
    assert caught.value.kind == "not-writable"
    assert str(caught.value).isprintable() or "\n" in str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
def test_flags_become_a_recipe(tied: bool) -> None:
    log = b'{"step": 100, "flag": [1, 3]}\n{"step": 140, "flag": [0, 5]}\n'
    log += b'{"step": 160, "flag": [2, 3]}\n{"step": 170, "flag": [4]}\n'
    layers = layers_of(4, tied=tied)
    saves = [save(each.step, *flags_to_layers(each.units, 4, tied)) for each in read_flags(log, "flags.jsonl")]
    text = compose_recipe(saves, layers=layers.names, step=165, default="run/checkpoint-50")
    recipe = parse_recipe(text.encode(), "r.yaml")
    sources = {path: SourceLayers(layers=layers) for path in sources_of(recipe)}
    found = {name: path.rpartition("-")[2] for name, (path, _) in origins(resolve(recipe, sources)).items()}
    expected = {"layers.0": "100", "layers.1": "160", "layers.2": "160", "layers.3": "50", "norm": "140"}
    expected |= {"embed_tokens": "140"} if tied else {"embed_tokens": "50", "lm_head": "140"}
    assert found == expected


NAMES = st.text("ab.,-013[]*?!' \"#:\\\u00e9\u4e2d\U0001f600\u200b", min_size=1, max_size=8).filter(str.strip)
PATHS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(str.strip)


@given(st.data())
def test_written_recipe_reads_back_to_the_same_choice(data: st.DataObject) -> None:
    names = data.draw(st.lists(NAMES, unique=True, min_size=1, max_size=8))
    paths = data.draw(st.lists(PATHS, unique=True, min_size=1, max_size=4))
    some = st.lists(st.sampled_from(names), unique=True).map(tuple)
    saves = [SavedLayers(path=path, step=data.draw(st.integers(0, 9)), layers=data.draw(some)) for path in paths]
    default, step = data.draw(st.sampled_from(["a default", *paths])), data.draw(st.integers(0, 9))
    recipe = parse_recipe(compose_recipe(saves, layers=names, step=step, default=default).encode(), "r.yaml")
    own = (Layer(name=name, kind=LayerKind.OTHER, stack=None, index=None, fqns=(f"{name}.weight",)) for name in names)
    layers = LayerMap(tuple(own))
    resolution = resolve(recipe, {path: SourceLayers(layers=layers) for path in sources_of(recipe)})
    chosen = choose_newest(saves, layers=names, step=step)
    expected = {name: (chosen[name].path if name in chosen else default, name) for name in names}
    assert origins(resolution) == expected
    newest = max((each.step for each in saves if each.step <= step and each.layers), default=None)
    assert newest is None or resolution.state_from in {each.path for each in saves if each.step == newest}
