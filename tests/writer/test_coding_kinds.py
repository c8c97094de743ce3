"""Tensors of every kind beside codes, weights alone, and the memory that codes take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coded_runs import check_errors, check_layers
from faults import open_descriptors
from llmtailor.checkpoint import open_checkpoint
from llmtailor.checkpointer import Checkpointer
from llmtailor.load import plan_load
from llmtailor.model_state import read_model
from llmtailor.storage import FileReader
from llmtailor.verify import verify_checkpoint
from llmtailor.writer.coding import LayerEncoder
from tiny_models import Snapshot, assert_same
from writer.coded_trainings import (
    BLOCKS,
    CODECS_OF,
    COMPACT4,
    Q4,
    check,
    coded_layers,
    layers_of,
    new_training,
    nothing,
)
from writer.trainings import OPTIMIZERS, Training, state_of, write_small_file

# Tensors of every kind


class Noted(torch.optim.Optimizer):
    """Keeps numbers that are no tensors beside moments, as torch's optimizers of old did."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {"step": 0, "scale": 0.5, "is_warm": False, "nothing": None, "name": "a"}
                    state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                    state["history"] = {"window": [1, 2.5], "kept": torch.zeros(5000)}
                state["step"] += 1
                state["is_warm"] = True
                state["exp_avg"].lerp_(parameter.grad, 0.1)
                state["exp_avg_sq"].lerp_(parameter.grad.square(), 0.1)
                state["history"]["kept"].add_(1)
                parameter.add_(state["exp_avg"], alpha=-group["lr"])


class Zoo(torch.nn.Module):
    """Layers of tensors that are strided, odd, tied, frozen, empty, no floats, of 16 bits, or none of all that."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.strided = torch.nn.Module()
        self.strided.turned = torch.nn.Parameter(draw(90, 70).t())
        self.strided.image = torch.nn.Parameter(draw(40, 13, 3, 5).to(memory_format=torch.channels_last))
        self.strided.every_other = torch.nn.Parameter(draw(61, 200)[:, ::2])
        self.strided.halves = torch.nn.Parameter(draw(77, 70, dtype=torch.bfloat16).t())
        self.odd = torch.nn.Module()
        self.odd.prime = torch.nn.Parameter(draw(4099))
        self.odd.least = torch.nn.Parameter(draw(4096))
        self.odd.strips = torch.nn.Parameter(draw(2 * 2**15 + 65))
        self.odd.small = torch.nn.Parameter(draw(4095))
        self.odd.scalar = torch.nn.Parameter(draw())
        self.odd.empty = torch.nn.Parameter(torch.empty(0, 7))
        self.odd.zeros = torch.nn.Parameter(torch.zeros(5000))
        self.mixed = torch.nn.Module()
        self.mixed.halves = torch.nn.Parameter(draw(100, 51, dtype=torch.bfloat16))
        self.mixed.f16 = torch.nn.Parameter(draw(5001, dtype=torch.float16))
        self.mixed.frozen = torch.nn.Parameter(draw(70, 90), requires_grad=False)
        self.mixed.register_buffer("table", draw(6000))
        self.other = torch.nn.Module()
        self.other.large = torch.nn.Parameter(draw(300, 150))
        self.other.doubles = torch.nn.Parameter(draw(4500, dtype=torch.float64))
        self.other.register_buffer("counts", torch.arange(7000))
        self.other.register_buffer("mask", torch.arange(5000) % 3 == 0)
        self.frozen = torch.nn.Linear(70, 65)
        self.frozen.requires_grad_(False)
        self.first = torch.nn.Linear(80, 80, bias=False)
        self.second = torch.nn.Linear(80, 80)
        self.second.weight = self.first.weight

    def change(self) -> None:
        """What forward would do to buffers."""
        self.mixed.table.mul_(1.01)
        self.other.counts.add_(1)


class ZooTraining(Training):
    """A training of a zoo, by made-up gradients."""

    def __post_init__(self) -> None:
        self.optimizer = self.make_optimizer([each for each in self.model.parameters() if each.requires_grad])
        self.checkpointer = Checkpointer(self.directory, **self.options)

    def make_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return Noted(parameters) if self.optimizer_name == "noted" else OPTIMIZERS[self.optimizer_name](parameters)

    def backward(self) -> None:
        generator = torch.Generator().manual_seed(self.step)
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                # As strided as the parameter, so that the moments are, too.
                grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype)
                parameter.grad = torch.empty_like(parameter).copy_(grad)
        self.model.change()  # type: ignore[operator]

    def state(self) -> Snapshot:
        return zoo_state(self.model, self.optimizer)


def zoo_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
    """By the names in a checkpoint: without the second name of what is tied, and with numbers as tensors."""
    found = state_of(model, optimizer)
    del found["second.weight"]
    names = {parameter: name for name, parameter in model.named_parameters()}
    numbers = {bool: torch.bool, int: torch.int64, float: torch.float64}
    for parameter, leaves in optimizer.state.items():
        for leaf, value in leaves.items():
            if type(value) in numbers:
                found[f"state.{names[parameter]}.{leaf}"] = torch.tensor(value, dtype=numbers[type(value)])
        if "history" in leaves:
            key = f"state.{names[parameter]}.history"
            found[f"{key}/kept"] = leaves["history"]["kept"].clone()
            found[f"{key}/window/0"] = torch.tensor(1)
            found[f"{key}/window/1"] = torch.tensor(2.5, dtype=torch.float64)
    return found


@pytest.mark.parametrize(
    ("rest", "optimizer_name"),
    [("q8", "noted"), ("q8", "amsgrad"), (Q4, "foreach"), ("compact", "noted"), (COMPACT4, "foreach")],
    ids=["q8-noted", "q8-amsgrad", "q4", "compact-noted", "compact4"],
)
def test_tensors_of_every_kind(fast_directory: Path, rest: str, optimizer_name: str) -> None:
    training = ZooTraining(
        directory=fast_directory / "run",
        model=Zoo(),
        optimizer_name=optimizer_name,
        options={"rest": rest, "strategy": nothing},
    )
    for _ in range(3):
        training.train()
        training.save()
    for handle in training.handles[1:]:
        path = handle.result()
        assert {"strided", "odd", "mixed", "other", "first"} <= coded_layers(path)
        expected = check(training, path, CODECS_OF[rest])
        # Into a model with another memory layout, too.
        for model in (Zoo(), relayed(Zoo())):
            with torch.no_grad():
                for tensor in model.state_dict().values():
                    tensor.fill_(1)
            optimizer = training.make_optimizer([each for each in model.parameters() if each.requires_grad])
            plan_load(open_checkpoint(path), read_model(model), [optimizer]).fill()
            loaded = zoo_state(model, optimizer)
            assert_same(loaded, expected)
            if optimizer_name == "noted":
                state = optimizer.state[model.get_parameter("odd.prime")]
                assert (state["step"], state["scale"], state["is_warm"]) == (training_step(path), 0.5, True)
                assert (state["nothing"], state["name"]) == (None, "a")
                assert state["history"]["window"] == [1, 2.5]
        check_errors(open_checkpoint(path).manifest, loaded, training.states)
    training.close()


def training_step(path: Path) -> int:
    return open_checkpoint(path).manifest.step


def relayed(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with every matrix transposed in memory, and what was strided contiguous."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_contiguous() and parameter.ndim == 2:
                parameter.data = parameter.data.t().contiguous().t()
            else:
                parameter.data = parameter.data.contiguous()
    return model


@pytest.mark.parametrize("rest", ["q8", "compact"])
def test_weights_alone_are_coded_too(fast_directory: Path, rest: str) -> None:
    model = Zoo()
    saver = Checkpointer(fast_directory / "run", rest=rest, strategy=nothing)
    states = {}
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.001)
        states[step] = {name: each.clone() for name, each in model.state_dict().items() if name != "second.weight"}
        path = saver.save(step, model, [], write_small_file, contents="weights").result()
    saver.close()
    assert "odd" in coded_layers(path)
    assert verify_checkpoint(path).is_good
    manifest = open_checkpoint(path).manifest
    expected = check_layers(path, manifest, states)
    assert all(layer.optimizer is None for layer in manifest.layers)
    assert {layer.encoding.update_count for layer in manifest.layers if layer.encoding} == {None}
    check_errors(manifest, expected, states)


# Memory


def largest_codes(path: Path) -> int:
    """Bytes of the codes of the largest layer, as they are in its file."""
    return max(layer.encoding.codes.bytes for layer in layers_of(path).values() if layer.encoding is not None)


@pytest.mark.parametrize("rest", ["q8", "compact"])
def test_scratch_memory_is_one_layers_codes_and_used_again(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch, rest: str
) -> None:
    training = new_training(fast_directory, rest=rest, strategy=nothing)
    sizes: list[tuple[int, int]] = []
    encode = LayerEncoder.encode

    def note(encoder: LayerEncoder, *args: Any) -> Any:
        encoded = encode(encoder, *args)
        memory = encoder._scratch._memory
        sizes.append((memory.tensor.data_ptr(), memory.nbytes))
        assert encoder.scratch_nbytes == memory.nbytes
        return encoded

    monkeypatch.setattr(LayerEncoder, "encode", note)
    for _ in range(6):
        training.train()
        training.save()
    path = training.handles[-1].result()
    assert len(sizes) == 5 * len(BLOCKS)
    assert len(set(sizes)) == 1, "the memory was exchanged"
    assert 0 < sizes[0][1] <= largest_codes(path)
    handle = training.handles[-1]
    assert handle.stats is not None
    assert handle.stats.pool_nbytes > sizes[0][1]
    training.close()


def test_all_memory_but_the_scratch_is_the_pools(fast_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What codes are relative to is read into it, and what kernels need comes off it."""
    pool_nbytes = 2**18
    training = new_training(fast_directory, strategy=nothing, options={"pool_nbytes": pool_nbytes})
    training.train()
    training.save().result()
    engine = training.checkpointer._engine
    assert engine._pool.limit_nbytes == pool_nbytes * 3 // 4
    memory = np.frombuffer(engine._pool._memory.bytes, np.uint8)
    read = FileReader.read_piece
    offsets: set[int] = set()

    def note(reader: FileReader, *arguments: Any) -> memoryview:
        found = read(reader, *arguments)
        offsets.add(np.frombuffer(found, np.uint8).ctypes.data - memory.ctypes.data)
        return found

    monkeypatch.setattr(FileReader, "read_piece", note)
    training.train()
    training.save().result()
    assert offsets
    assert all(0 < offset < memory.nbytes for offset in offsets)
    training.close()
    exact = new_training(fast_directory.with_name("exact"), rest="skip", options={"pool_nbytes": pool_nbytes})
    assert exact.checkpointer._engine._pool.limit_nbytes == pool_nbytes
    exact.close()


def test_no_file_stays_open(fast_directory: Path) -> None:
    training = new_training(fast_directory, strategy=nothing)
    for _ in range(3):
        training.train()
        training.save().result()
    training.checkpointer.drain()
    before = open_descriptors()
    for _ in range(10):
        training.train()
        training.save().result()
    training.checkpointer.drain()
    assert open_descriptors() == before
    training.close()
