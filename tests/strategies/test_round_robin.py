"""Round robin: which group a save writes, how large the groups are, how long a layer waits, and saves of nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.checkpoint import open_checkpoint
from llmtailor.checkpointer import Checkpointer
from llmtailor.errors import InvalidInputError
from llmtailor.layers import LayerKind
from llmtailor.strategies import LayerStatus, RoundRobin, SaveContext, choose_layers
from llmtailor.verify import verify_checkpoint


def make_layers(*sizes: int, kind: LayerKind = LayerKind.BLOCK) -> tuple[LayerStatus, ...]:
    """Layers of these sizes that were saved at step 0, called after their places."""
    return tuple(
        LayerStatus(
            name=f"{kind.value}.{place}",
            kind=kind,
            stack=kind.value if kind is LayerKind.BLOCK else None,
            index=place if kind is LayerKind.BLOCK else None,
            nbytes=size,
            saved_step=0,
        )
        for place, size in enumerate(sizes)
    )


def select(n: int, layers: tuple[LayerStatus, ...], save_index: int) -> frozenset[str]:
    return RoundRobin(n).select(SaveContext(step=save_index, save_index=save_index, layers=layers))


def places(*numbers: int) -> set[str]:
    return {f"block.{number}" for number in numbers}


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        # Largest first onto the lightest: 9 | 8 | 7, then 5 onto 7, 4 onto 8, 1 onto 9.
        ((4, 9, 1, 8, 5, 7), [places(1, 2), places(3, 0), places(5, 4)]),
        # Ties go to the first layer and to the first group.
        ((5, 5, 5, 5, 5), [places(0, 3), places(1, 4), places(2)]),
        # A large layer has a save to itself.
        ((1, 1, 1, 1, 10), [places(4), places(0, 2), places(1, 3)]),
        ((1, 2), [places(1), places(0), set()]),
        ((), [set(), set(), set()]),
    ],
)
def test_layers_go_largest_first_onto_the_lightest_group(sizes: tuple[int, ...], groups: list[set[str]]) -> None:
    layers = make_layers(*sizes)
    assert [select(3, layers, save_index) for save_index in range(3)] == groups
    assert [select(3, layers, save_index) for save_index in range(300, 303)] == groups


def test_norms_are_written_always_and_weigh_on_no_group() -> None:
    norms = make_layers(1000, 1000, kind=LayerKind.OTHER)
    layers = norms + make_layers(3, 2, 1)
    always = {layer.name for layer in norms}
    assert [select(2, layers, save_index) - always for save_index in range(2)] == [places(0), places(1, 2)]
    assert all(select(2, layers, save_index) >= always for save_index in range(2))


def test_embeddings_and_heads_take_turns() -> None:
    layers = make_layers(4, kind=LayerKind.EMBEDDING) + make_layers(3, kind=LayerKind.HEAD) + make_layers(2, 1)
    assert select(2, layers, 0) == {"embedding.0", "block.1"}
    assert select(2, layers, 1) == {"head.0", "block.0"}


def test_one_group_is_everything() -> None:
    layers = make_layers(3, 2, 1)
    assert select(1, layers, 7) == places(0, 1, 2)


def test_as_many_groups_as_there_are_numbers_take_no_time() -> None:
    assert select(10**30, make_layers(3, 2), 10**30 + 1) == places(1)


@pytest.mark.parametrize("n", [0, -1, True, 1.5, None])
def test_a_number_of_groups_that_makes_no_sense_is_refused(n: int) -> None:
    with pytest.raises(InvalidInputError, match="'n' of strategy 'round_robin'"):
        RoundRobin(n)


SIZES = st.lists(st.integers(0, 10) | st.integers(0, 10**12), max_size=30)


@st.composite
def models(draw: st.DrawFn) -> tuple[LayerStatus, ...]:
    layers = make_layers(*draw(SIZES)) + make_layers(*draw(SIZES), kind=LayerKind.OTHER)
    return tuple(draw(st.permutations(layers)))


@given(layers=models(), n=st.integers(1, 40), save_index=st.integers(0, 100))
def test_any_n_saves_in_a_row_write_each_layer_once(layers: tuple[LayerStatus, ...], n: int, save_index: int) -> None:
    chosen = [select(n, layers, save_index + i) for i in range(n)]
    for layer in layers:
        times = sum(layer.name in each for each in chosen)
        assert times == (n if layer.kind is LayerKind.OTHER else 1), layer


@given(layers=models(), n=st.integers(1, 12), first=st.integers(1, 100))
def test_no_layer_misses_more_than_n_minus_1_saves_in_a_row(
    layers: tuple[LayerStatus, ...], n: int, first: int
) -> None:
    missed = {layer.name: 0 for layer in layers}
    for save_index in range(first, first + 3 * n):
        for choice in choose_layers(RoundRobin(n), SaveContext(step=1, save_index=save_index, layers=layers)):
            missed[choice.layer] = 0 if choice.is_saved else missed[choice.layer] + 1
        assert max(missed.values(), default=0) <= n - 1


@given(layers=models(), n=st.integers(1, 40))
def test_the_largest_save_is_at_most_the_lightest_and_one_layer(layers: tuple[LayerStatus, ...], n: int) -> None:
    sizes = {layer.name: layer.nbytes for layer in layers}
    saves = [sum(sizes[name] for name in select(n, layers, save_index)) for save_index in range(n)]
    assert max(saves) <= min(saves) + max(sizes.values(), default=0)


@given(layers=models(), n=st.integers(1, 12), save_index=st.integers(0, 100), saved=st.integers(0, 100))
def test_the_answer_does_not_depend_on_when_layers_were_saved(
    layers: tuple[LayerStatus, ...], n: int, save_index: int, saved: int
) -> None:
    other = tuple(dataclasses.replace(layer, saved_step=saved) for layer in layers)
    asked = [SaveContext(step=100, save_index=save_index, layers=each) for each in (layers, other)]
    assert RoundRobin(n).select(asked[0]) == RoundRobin(n).select(asked[1])


def test_saves_that_write_no_layer_are_whole_checkpoints(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    checkpointer = Checkpointer(tmp_path, strategy="round_robin(4)")
    for step in range(1, 7):
        sum(layer(torch.ones(4)).sum() for layer in model.layers).backward()
        optimizer.step()
        checkpointer.save(step, model, [optimizer], lambda directory: None).result()
    checkpointer.close()

    checkpoints = [open_checkpoint(tmp_path / f"checkpoint-{step}") for step in range(1, 7)]
    steps = [{layer.name: layer.step for layer in each.manifest.layers} for each in checkpoints]
    first, second = steps[0]
    assert [each[first] for each in steps] == [1, 1, 1, 1, 5, 5]
    assert [each[second] for each in steps] == [1, 2, 2, 2, 2, 6]
    for each in checkpoints:
        assert verify_checkpoint(each.path).is_good
