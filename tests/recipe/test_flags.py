"""flags.jsonl of LLMTailor and StreamCheck: which layers were saved when."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.errors import FormatError
from llmtailor.layers import map_names
from llmtailor.recipe import FlaggedSave, flags_to_layers, read_flags
from recipe.small_sources import layers_of


def refuse(text: str | bytes) -> str:
    with pytest.raises(FormatError) as caught:
        read_flags(text.encode() if isinstance(text, str) else text, "logs/flags.jsonl")
    assert (caught.value.kind, caught.value.path) == ("bad-flags", "logs/flags.jsonl")
    assert '{"step": 160, "flag": [0, 3, 29]}' in str(caught.value)
    return str(caught.value)


def test_read_flags_gives_steps_and_units() -> None:
    text = b'{"step": 1, "flag": []}\n\n{"flag": [0, 3, 29], "step": 160}\r\n{"step": 161, "flag": [30]}'
    assert read_flags(text, "x") == (
        FlaggedSave(step=1, units=()),
        FlaggedSave(step=160, units=(0, 3, 29)),
        FlaggedSave(step=161, units=(30,)),
    )


def test_no_flags_are_no_saves() -> None:
    assert read_flags(b"\n", "x") == ()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"step": 160, "flag": [0, 3', "Expecting"),
        ("[160, [0]]", "expected an object"),
        ('{"step": 160}', "expected the keys step and flag, found 'step'"),
        ('{"step": 160, "flag": [0], "rank": 0}', "'rank'"),
        ('{"step": "160", "flag": [0]}', "step must be a whole number, 0 or more, not '160'"),
        ('{"step": -1, "flag": [0]}', "0 or more"),
        ('{"step": true, "flag": [0]}', "step must be"),
        ('{"step": 1.0, "flag": [0]}', "step must be"),
        ('{"step": 160, "flag": 3}', "flag must be a list"),
        ('{"step": 160, "flag": [0, -1]}', "flag must be a list"),
        ('{"step": 160, "flag": [0, true]}', "flag must be a list"),
        ('{"step": 160, "flag": ["layers.0"]}', "flag must be a list"),
        ('{"step": 160, "flag": [3, 3]}', "holds a number twice"),
        ('{"step": 160, "step": 161, "flag": [3]}', "stands there twice"),
        ('{"step": NaN, "flag": [3]}', "NaN"),
        ('{"step": 9, "flag": [3]}', "step 9 does not come after step 10"),
        ('{"step": 10, "flag": [3]}', "step 10 does not come after step 10"),
        ('{"a":' * 100_000, "nested too deeply"),
        (" " * 2**20 + "x", "too long"),
    ],
)
def test_wrong_line_is_refused_with_its_number(line: str, said: str) -> None:
    message = refuse(f'{{"step": 10, "flag": [0]}}\n\n{line}\n')
    assert "line 3: " in message
    assert said in message


def test_line_that_is_not_utf8_is_refused() -> None:
    assert "line 1: " in refuse(b'{"step": 1, "flag\xff": []}')


def test_all_wrong_lines_are_reported_together() -> None:
    message = refuse("x\n" * 40)
    assert "line 1: " in message
    assert "line 25: " in message
    assert "... and 15 more" in message


@given(st.binary(max_size=60) | st.text(st.sampled_from('{}[]":,stepflag10 \n'), max_size=60).map(str.encode))
def test_read_flags_raises_nothing_else(text: bytes) -> None:
    with contextlib.suppress(FormatError):
        read_flags(text, "x")


@pytest.mark.parametrize(
    ("tied", "units", "names"),
    [
        (False, [0, 1, 28, 29, 30], ("norm", "layers.0", "layers.27", "lm_head", "embed_tokens")),
        (True, [0, 1, 28, 29], ("norm", "layers.0", "layers.27", "embed_tokens")),
        (True, [], ()),
        (False, [3, 2], ("layers.2", "layers.1")),
    ],
)
def test_units_stand_for_layers(tied: bool, units: list[int], names: tuple[str, ...]) -> None:
    assert flags_to_layers(units, 28, tied) == names


@pytest.mark.parametrize(("tied", "unit", "last"), [(False, 31, 30), (True, 30, 29), (True, -1, 29)])
def test_unit_that_stands_for_nothing_is_refused(tied: bool, unit: int, last: int) -> None:
    with pytest.raises(FormatError) as caught:
        flags_to_layers([0, unit], 28, tied)
    assert caught.value.kind == "bad-flags"
    assert f"0 to {last}, as the model is {'tied' if tied else 'untied'} and has 28 blocks" in str(caught.value)
    assert caught.value.found == str(unit)


@pytest.mark.parametrize("tied", [False, True])
def test_all_units_of_a_model_are_all_its_layers(tied: bool) -> None:
    layers = layers_of(5, tied=tied)
    assert sorted(flags_to_layers(range(len(layers)), 5, tied)) == sorted(layers.names)
    assert sorted(flags_to_layers(range(len(layers)), 5, tied, layers=layers)) == sorted(layers.names)


def test_models_that_call_their_layers_otherwise_are_asked() -> None:
    names = [f"gpt_neox.layers.{index}.mlp.weight" for index in range(3)]
    names += ["gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm.weight", "embed_out.weight"]
    layers = map_names(dict.fromkeys(names, (4, 4)))
    found = flags_to_layers([0, 1, 4, 5], 3, False, layers=layers)
    assert set(found) <= set(layers.names)
    assert [name.rpartition(".")[2] for name in found] == ["final_layer_norm", "0", "embed_out", "embed_in"]
