"""A model is read once, and again as soon as it is another one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llmtailor.live_state import LiveReader
from llmtailor.local_parts import Seat
from llmtailor.model_state import ModelReader, read_model
from llmtailor.optimizer_state import StateReader, parameter_names
from llmtailor.shards import Shard
from llmtailor.writer import find_masters, optimizer_image, weights_image
from llmtailor.writer.images import LayerImage


def build() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))


def replace_parameter(model: torch.nn.Module) -> None:
    model[0].weight = torch.nn.Parameter(torch.zeros(4, 4))


def tie(model: torch.nn.Module) -> None:
    model[2].weight = model[0].weight


def change_dtype_in_place(model: torch.nn.Module) -> None:
    model[0].weight.data = model[0].weight.data.bfloat16()


CHANGES = [
    replace_parameter,
    tie,
    change_dtype_in_place,
    lambda model: model[0].weight.requires_grad_(False),
    lambda model: model.append(torch.nn.Linear(4, 4)),
    lambda model: model[1].register_buffer("more", torch.zeros(2)),
]
NAMES = ["another parameter", "a tie", "a type", "frozen", "a module", "a buffer"]


def test_model_that_stays_is_read_once() -> None:
    model, reader = build(), ModelReader()
    first = reader.read(model)
    torch.nn.init.zeros_(model[0].weight)
    assert reader.read(model) is first


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_model_that_changed_is_read_anew(change: Callable[[torch.nn.Module], object]) -> None:
    model, reader = build(), ModelReader()
    first = reader.read(model)
    change(model)
    again = reader.read(model)
    assert again is not first
    assert again.records == read_model(model).records
    assert again.tensors.keys() == read_model(model).tensors.keys()
    assert all(again.tensors[fqn] is tensor for fqn, tensor in read_model(model).tensors.items())


def test_another_model_is_another_model() -> None:
    reader = ModelReader()
    first, second = build(), build()
    assert reader.read(first).tensors["0.weight"] is first[0].weight
    assert reader.read(second).tensors["0.weight"] is second[0].weight


class TestOptimizerState:
    """The same for an optimizer: what did not change is the same object, what did is what the optimizer has now."""

    @staticmethod
    def train() -> tuple[torch.nn.Module, torch.optim.Optimizer, StateReader, dict[torch.Tensor, str]]:
        model = build()
        optimizer = torch.optim.AdamW(model.parameters())
        step(model, optimizer)
        return model, optimizer, StateReader(optimizer), parameter_names(model.named_parameters())

    def test_step_in_place_reads_nothing_anew(self) -> None:
        model, optimizer, reader, names = self.train()
        first = reader.read(names)
        step(model, optimizer)
        again = reader.read(names)
        assert all(again[fqn] is state for fqn, state in first.items())
        assert again["0.weight"].tensors["step"].item() == 2

    @pytest.mark.parametrize("how", ["replaced", "moved", "cast", "loaded", "more"])
    def test_state_that_is_another_is_read_anew(self, how: str) -> None:
        model, optimizer, reader, names = self.train()
        reader.read(names)
        state = optimizer.state[model[0].weight]
        match how:
            case "replaced":
                state["exp_avg"] = torch.full((4, 4), 3.0)
            case "moved":
                state["exp_avg"].data = torch.full((4, 4), 3.0)
            case "cast":
                state["exp_avg"].data = state["exp_avg"].data.bfloat16()
            case "loaded":
                optimizer.load_state_dict(optimizer.state_dict())
            case "more":
                state["extra"] = torch.ones(2)
        found = reader.read(names)["0.weight"].tensors
        assert found.keys() == state.keys()
        assert all(found[leaf].data_ptr() == value.data_ptr() for leaf, value in state.items())
        assert all(found[leaf].dtype == value.dtype for leaf, value in state.items())

    def test_numbers_are_read_every_time(self) -> None:
        model, optimizer, reader, names = self.train()
        for number in (3, 4):
            optimizer.state[model[0].weight]["count"] = number
            assert reader.read(names)["0.weight"].tensors["count"].item() == number


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()


def test_images_are_made_anew_for_the_layer_that_changed_alone() -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    reader = LiveReader()
    first = reader.read(model, [optimizer]).images
    optimizer.state[model[0].weight]["exp_avg"] = torch.full((4, 4), 3.0)
    again = reader.read(model, [optimizer]).images
    changed = {layer for layer, image in again.items() if image is not first[layer]}
    assert len(changed) == 1
    assert reader.read(model, []).images[changed.pop()].optimizer is None


@pytest.mark.parametrize("is_spread", [False, True])
def test_layers_that_all_ranks_hold_are_written_by_their_owners_alone(is_spread: bool) -> None:
    """In the files that one process writes, byte for byte."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    alone = LiveReader().read(model, [optimizer])
    seats = [Seat(rank=rank, size=2, spread=is_spread) for rank in range(2)]
    ranks = [LiveReader(seat=seat).read(model, [optimizer]) for seat in seats]
    owners = [[rank for rank in range(2) if layer.name in ranks[rank].images] for layer in alone.layers]
    assert owners == [[number % 2 if is_spread else 0] for number in range(3)]
    written = {name: image for live in ranks for name, image in live.images.items()}
    assert {name: described(image) for name, image in written.items()} == {
        name: described(image) for name, image in alone.images.items()
    }
    assert all((live.nbytes, live.layout, live.layers) == (alone.nbytes, None, alone.layers) for live in ranks)


def described(image: LayerImage) -> list[tuple[str, bytes, list[int]]]:
    return [(file.name, file.layout.prefix, [tensor.data_ptr() for tensor in file.tensors]) for file in image.files]


def test_masters_of_a_layer_in_parts_are_not_told_of() -> None:
    weights, states = {"w": torch.ones(4, 2, dtype=torch.bfloat16)}, {"state.w.master_param": torch.ones(4, 2)}
    shard = Shard(shape=(8, 2), offsets=(4, 0), sizes=(4, 2))
    whole = weights_image("x", weights), optimizer_image("x", states, {})
    parts = (
        weights_image("x", weights, shards={"w": shard}, rank=1),
        optimizer_image("x", states, {}, shards={"state.w.master_param": shard}, rank=1),
    )
    assert find_masters(*whole) == {"w": "state.w.master_param"}
    for pair in ((whole[0], parts[1]), (parts[0], whole[1]), parts, (None, whole[1]), (whole[0], None)):
        assert find_masters(*pair) == {}
