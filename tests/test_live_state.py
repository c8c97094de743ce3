"""A model is read once, and again as soon as it is another one; the optimizer's state at every save."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from llmtailor import Run
from llmtailor.formats.safetensors import Layout
from llmtailor.live_state import LiveReader
from llmtailor.local_parts import Seat
from llmtailor.model_state import ModelReader, read_model
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


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()


def train() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    return model, optimizer


CHANGES_OF_STATE: dict[str, Callable[[torch.optim.Optimizer, dict[str, torch.Tensor]], object]] = {
    "replaced": lambda _, state: state.update(exp_avg=torch.full((4, 4), 3.0)),
    "moved": lambda _, state: setattr(state["exp_avg"], "data", torch.full((4, 4), 3.0)),
    "loaded": lambda optimizer, _: optimizer.load_state_dict(optimizer.state_dict()),
    "stepped": lambda optimizer, _: optimizer.step(),
    "cast": lambda _, state: setattr(state["exp_avg"], "data", state["exp_avg"].data.bfloat16()),
    "more": lambda _, state: state.update(extra=torch.ones(2)),
    "number": lambda _, state: state.update(extra=3),
    "less": lambda _, state: state.pop("exp_avg_sq"),
}
ALIKE = ("replaced", "moved", "loaded", "stepped")


@pytest.mark.parametrize("how", CHANGES_OF_STATE)
def test_state_is_what_the_optimizer_has_now_and_planned_anew_where_it_is_unlike(how: str) -> None:
    model, optimizer = train()
    reader = LiveReader()
    first = reader.read(model, [optimizer]).images
    CHANGES_OF_STATE[how](optimizer, optimizer.state[model[0].weight])
    again = reader.read(model, [optimizer]).images
    anew = LiveReader().read(model, [optimizer]).images
    assert {name: described(image) for name, image in again.items()} == {
        name: described(image) for name, image in anew.items()
    }
    changed = {name for name, image in again.items() if layout_of(image) is not layout_of(first[name])}
    assert len(changed) == (0 if how in ALIKE else 1)


def test_number_that_counts_is_read_every_time() -> None:
    model, optimizer = train()
    reader = LiveReader()
    for number in (3, 4):
        optimizer.state[model[0].weight]["count"] = number
        file = next(iter(reader.read(model, [optimizer]).images.values())).optimizer
        assert file is not None
        names = [stored.name for stored in file.layout.tensors]
        assert file.tensors[names.index("state.0.weight.count")].item() == number


def test_without_its_optimizer_there_is_no_state() -> None:
    model, optimizer = train()
    reader = LiveReader()
    reader.read(model, [optimizer])
    assert all(image.optimizer is None for image in reader.read(model, []).images.values())


@pytest.mark.parametrize("options", [{}, {"monitor": True}, {"rest": "q8", "strategy": "parity"}], ids=str)
def test_state_that_a_training_gives_up_after_a_save_is_let_go_of(tmp_path: Path, options: dict[str, Any]) -> None:
    """Offloading it is to make room, at once and not after the next save."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(96, 96) for _ in range(3)))
    optimizer = torch.optim.AdamW(model.parameters())
    with Run(tmp_path, model, optimizer, **options) as run:
        run.resume()
        for number in (1, 2):
            model(torch.randn(8, 96)).sum().backward()
            optimizer.step()
            handle = run.save(number)
            handle.result()
        memory = []
        for state in optimizer.state.values():
            for leaf in ("exp_avg", "exp_avg_sq"):
                memory.append(StorageWeakRef(state[leaf].untyped_storage()))
                state[leaf] = state[leaf].clone()
        deadline = time.monotonic() + 30  # a thread that wrote may still be about to end its turn
        while not all(each.expired() for each in memory) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert all(each.expired() for each in memory), handle
        optimizer.step()
        run.save(3).result()


def layout_of(image: LayerImage) -> Layout:
    assert image.optimizer is not None
    return image.optimizer.layout


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


def described(image: LayerImage) -> list[tuple[str, bytes, list[object]]]:
    """Numbers by value: they are made into tensors anew whenever they are read."""
    return [
        (file.name, file.layout.prefix, [each.item() if each.ndim == 0 else each.data_ptr() for each in file.tensors])
        for file in image.files
    ]


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
