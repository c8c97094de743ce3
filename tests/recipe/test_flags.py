"""flags.jsonl of LLMTailor and StreamCheck: which layers were saved when."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.errors import FormatError, InvalidInputError, NotFoundError, UnsupportedError
from llmtailor.layers import map_module, map_names
from llmtailor.recipe.flags import FlaggedSave, encode_flags, flags_to_layers, layers_to_flags, read_flags
from recipe.small_sources import layers_of
from tiny_models import build_llama


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


SAVES = st.lists(
    st.tuples(st.integers(0, 10**6), st.lists(st.integers(0, 40), unique=True, max_size=40)),
    unique_by=lambda save: save[0],
    max_size=8,
).map(lambda saves: [FlaggedSave(step=step, units=tuple(units)) for step, units in sorted(saves)])


def test_flags_are_written_as_llmtailor_writes_them() -> None:
    saves = [FlaggedSave(step=160, units=(0, 3, 29)), FlaggedSave(step=161, units=())]
    assert encode_flags(saves) == b'{"step": 160, "flag": [0, 3, 29]}\n{"step": 161, "flag": []}\n'
    assert encode_flags([]) == b""


@given(SAVES)
def test_flags_that_are_written_are_read_back(saves: list[FlaggedSave]) -> None:
    assert read_flags(encode_flags(saves), "x") == tuple(saves)


@pytest.mark.parametrize("steps", [(10, 10), (10, 9), (-1,)])
def test_flags_whose_steps_do_not_rise_are_not_written(steps: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match="steps have to rise") as caught:
        encode_flags(FlaggedSave(step=step, units=()) for step in steps)
    assert (caught.value.kind, caught.value.found) == ("bad-flags", steps[-1])


@pytest.mark.parametrize(
    ("tied", "units"),
    [
        (False, {"norm": 0, "layers.0": 1, "layers.2": 3, "lm_head": 4, "embed_tokens": 5}),
        (True, {"norm": 0, "layers.0": 1, "layers.2": 3, "embed_tokens": 4}),
    ],
)
def test_layers_have_the_numbers_of_llmtailor(tied: bool, units: dict[str, int]) -> None:
    assert layers_to_flags(units, layers_of(3, tied=tied)) == tuple(units.values())


@given(data=st.data(), num_blocks=st.integers(0, 12), tied=st.booleans(), stack=st.sampled_from(["layers", "h"]))
def test_layers_come_back_from_their_numbers(data: st.DataObject, num_blocks: int, tied: bool, stack: str) -> None:
    layers = layers_of(num_blocks, tied=tied, stack=stack)
    names = data.draw(st.lists(st.sampled_from(layers.names), unique=True))
    units = layers_to_flags(names, layers)
    assert flags_to_layers(units, num_blocks, tied, layers=layers) == tuple(names)
    assert sorted(layers_to_flags(layers.names, layers)) == list(range(len(layers)))


def test_head_that_shares_the_embedding_is_no_unit_of_a_live_model() -> None:
    layers = map_module(build_llama(num_layers=2, tied=True))
    assert layers_to_flags(layers.names, layers) == (3, 1, 2, 0)
    untied = map_module(build_llama(num_layers=2))
    assert layers_to_flags(untied.names, untied) == (4, 1, 2, 0, 3)


def two_stacks() -> list[str]:
    encoder = [f"encoder.layer.{index}.attn.q.weight" for index in range(2)]
    return encoder + [f"decoder.layer.{index}.attn.q.weight" for index in range(2)]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (two_stacks(), "decoder.layer.0, decoder.layer.1"),
        ([f"layers.{index}.attn.q.weight" for index in (0, 1, 3)], "layers.3"),
        (["wte.weight", "wpe.weight", "h.0.attn.q.weight"], "wte, wpe"),
        (["projector.weight", "layers.0.attn.q.weight", "norm.weight"], "projector"),
        ([f"{index}.attn.q.weight" for index in range(9)], "0, 1, 2, 3, 4, 5, 6, 7, 8"),
        ([f"part{index}.weight" for index in range(40)], "part24 and 15 more"),
    ],
)
def test_model_with_layers_that_no_number_stands_for_is_refused(names: list[str], said: str) -> None:
    layers = map_names(dict.fromkeys(names, (4, 4)))
    with pytest.raises(UnsupportedError, match=re.escape(said)) as caught:
        layers_to_flags([], layers)
    assert caught.value.kind == "no-unit"
    assert caught.value.layer in layers.names


def test_name_that_is_no_layer_is_refused() -> None:
    with pytest.raises(NotFoundError, match="did you mean"):
        layers_to_flags(["layers.0", "lm_heads"], layers_of(2))
