"""Layers whose optimizer keeps an fp32 master of every 16-bit weight: written exactly once, or as codes."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from coded_checkpoints import Tensors, read_tensors
from llmtailor.checkpoint import open_checkpoint
from llmtailor.checkpointer import Checkpointer
from llmtailor.codecs import CODES_KEY, parse_rest
from llmtailor.errors import IntegrityError, SaveFailedWarning
from llmtailor.formats.safetensors import open_file
from llmtailor.live_state import LiveReader
from llmtailor.manifest import LayerRecord
from llmtailor.strategies import SaveContext
from llmtailor.verify import verify_checkpoint
from llmtailor.writer import code_layer, packing
from llmtailor.writer.life import SaveState
from llmtailor.writer.pool import MIN_POOL_NBYTES
from master_adamw import LEAF, MasterAdamW, load, new_training, weights_that_are_not_rounded_masters
from tiny_models import Snapshot, assert_same
from writer.trainings import Training

# Of the blocks of ``Model``: the matrices of 4096 elements.
LARGE = ("mlp.weight", "back.weight")
BLOCKS = [f"layers.{index}" for index in range(4)]


def nothing(context: SaveContext) -> list[str]:
    """All but the first save are codes alone."""
    return []


def layers_of(path: Path) -> dict[str, LayerRecord]:
    report = verify_checkpoint(path)
    assert report.is_good, report.problems
    return {layer.name: layer for layer in open_checkpoint(path).manifest.layers}


def codecs_of(path: Path, file: str) -> dict[str, str]:
    text = open_file(path / file).header.metadata.get(CODES_KEY)
    return {} if text is None else {key: entry["codec"] for key, entry in json.loads(text).items()}


def master_of(fqn: str, leaf: str = LEAF) -> str:
    return f"state.{fqn}.{leaf}"


def split_slowly(master: torch.Tensor, weight: torch.Tensor) -> Tensors | None:
    """What a file holds of a master, element by element; None if the weight is something else."""
    codes, ties = [], []
    bits = [each & 0xFFFFFFFF for each in master.reshape(-1).view(torch.int32).tolist()]
    halves = [each & 0xFFFF for each in weight.reshape(-1).view(torch.int16).tolist()]
    for index, (whole, half) in enumerate(zip(bits, halves, strict=True)):
        rest = (whole - (half << 16) + 2**31) % 2**32 - 2**31
        if not -0x8000 <= rest <= 0x8000 or (abs(rest) == 0x8000 and half % 2):
            return None
        codes.append(rest if rest < 0x8000 else -0x8000)
        if rest == 0x8000:
            ties.append(index)
    return {"codes": torch.tensor(codes, dtype=torch.int16), "ties": torch.tensor(ties, dtype=torch.int64)}


def of_files(state: Snapshot, layer: str, leaf: str = LEAF) -> tuple[Tensors, Tensors, set[str]]:
    """What the weights and the optimizer file of an exact layer hold, and which masters are packed."""
    weights = {key: value for key, value in state.items() if key.startswith(f"{layer}.")}
    optimizer = {key: value for key, value in state.items() if key.startswith(f"state.{layer}.")}
    packed = set()
    for fqn, weight in weights.items():
        key = master_of(fqn, leaf)
        if key in optimizer and weight.dtype == torch.bfloat16 and weight.numel() >= 4096:
            found = split_slowly(optimizer[key], weight)
            if found is not None:
                packed.add(key)
                del optimizer[key]
                optimizer |= {f"{key}|{name}": array for name, array in found.items()}
    return weights, optimizer, packed


def check_exact(path: Path, layer: LayerRecord, state: Snapshot, leaf: str = LEAF) -> set[str]:
    """The files of a layer are what they have to be, bit for bit; gives the masters that are packed."""
    assert layer.encoding is None
    assert layer.optimizer is not None
    weights, optimizer, packed = of_files(state, layer.name, leaf)
    assert_same(read_tensors(path / layer.weights.path), weights)
    assert_same(read_tensors(path / layer.optimizer.path), optimizer)
    assert codecs_of(path, layer.optimizer.path) == dict.fromkeys(packed, "tail16")
    return packed


# Exact


@pytest.mark.parametrize("leaf", ["master_param", "master_weight", "master"])
def test_a_master_is_written_as_what_its_weight_lacks(fast_directory: Path, leaf: str) -> None:
    training = new_training(fast_directory, leaf=leaf)
    training.train(2)
    path = training.save().result()
    training.close()
    found = {name: check_exact(path, layer, training.states[2], leaf) for name, layer in layers_of(path).items()}
    blocks = {name: {master_of(f"{name}.{matrix}", leaf) for matrix in LARGE} for name in BLOCKS}
    assert found == {**blocks, "embed_tokens": set(), "norm": set(), "lm_head": set()}
    assert_same(load(path, training).state(), training.states[2])
    assert open_checkpoint(path).manifest.is_consistent


CASES: dict[str, dict[str, Any]] = {
    "one at a time": {},
    "three in flight": {"max_in_flight": 3},
    "smallest pool, three in flight": {"pool_nbytes": MIN_POOL_NBYTES, "max_in_flight": 3},
    "parity": {"strategy": "parity"},
    "blocking": {"capture": "blocking"},
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_packed_is_of_the_moment_of_the_save(fast_directory: Path, case: str) -> None:
    training = new_training(fast_directory, **CASES[case])
    for _ in range(8):
        training.train()
        training.save()
    paths = [handle.result() for handle in training.handles]
    training.close()
    for path in paths:
        for layer in layers_of(path).values():
            check_exact(path, layer, training.states[layer.step])


def test_training_waits_until_masters_are_packed(fast_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split, is_open = packing.split_master, threading.Event()

    def wait_and_split(master: torch.Tensor, weight: torch.Tensor) -> Any:
        assert is_open.wait(60)
        return split(master, weight)

    monkeypatch.setattr(packing, "split_master", wait_and_split)
    training = new_training(fast_directory)
    training.train()
    handle = training.save()
    training.backward()
    assert handle.state is SaveState.CAPTURING
    threading.Timer(0.3, is_open.set).start()
    training.optimizer.step()
    assert is_open.is_set(), "the step did not wait"
    for layer in layers_of(handle.result()).values():
        check_exact(handle.result(), layer, training.states[1])
    training.close()


def test_a_weight_that_changes_while_it_is_packed_fails_the_save(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = new_training(fast_directory)
    training.train()
    split = packing.split_master

    def change_and_split(master: torch.Tensor, weight: torch.Tensor) -> Any:
        with torch.no_grad():
            training.model.layers[0].mlp.weight.mul_(2)  # type: ignore[union-attr,index]
        return split(master, weight)

    monkeypatch.setattr(packing, "split_master", change_and_split)
    handle = training.save()
    with pytest.raises(IntegrityError) as caught:
        handle.result()
    assert (caught.value.kind, caught.value.fqn) == ("changed-during-capture", "layers.0.mlp.weight")
    with pytest.warns(SaveFailedWarning):
        training.checkpointer.collect()
    with pytest.raises(IntegrityError):
        training.close()


def set_halves(training: Training, uppers: torch.Tensor) -> None:
    """Have the masters of a matrix be halves between two weights, and the weights what torch makes of them."""
    weight = training.model.layers[0].mlp.weight  # type: ignore[union-attr,index]
    master = training.optimizer.state[weight][LEAF]
    bits = master.view(torch.int32).view(-1)
    bits[: uppers.numel()] = (uppers.int() << 16) + 0x8000
    with torch.no_grad():
        weight.copy_(master)


def test_masters_halfway_between_two_weights_come_back(fast_directory: Path) -> None:
    training = new_training(fast_directory)
    training.train()
    set_halves(training, torch.tensor([0x3F80, 0x3F81, 0x3F82, 0x4000, 0x3FFF, 0x0000, 0x0001]))
    path = training.save().result()
    training.close()
    key = master_of("layers.0.mlp.weight")
    layer = layers_of(path)["layers.0"]
    assert key in check_exact(path, layer, training.states[1])
    assert layer.optimizer is not None
    assert {0, 2, 3, 5} <= set(read_tensors(path / layer.optimizer.path)[f"{key}|ties"].tolist())
    assert_same(load(path, training).state(), training.states[1])


def test_a_master_with_many_ties_is_written_as_it_is(fast_directory: Path) -> None:
    training = new_training(fast_directory)
    training.train()
    set_halves(training, torch.arange(0x3F00, 0x3F00 + 2 * 73, 2))  # one more than a 64th of 4608
    path = training.save().result()
    training.close()
    layer = layers_of(path)["layers.0"]
    assert layer.optimizer is not None
    assert_same(
        read_tensors(path / layer.optimizer.path),
        of_files_but(training.states[1], "layers.0.mlp.weight"),
    )
    assert_same(load(path, training).state(), training.states[1])


def of_files_but(state: Snapshot, fqn: str) -> Tensors:
    """The optimizer file of ``layers.0`` with the master of a weight as it is."""
    optimizer = of_files(state, "layers.0")[1]
    del optimizer[f"{master_of(fqn)}|codes"], optimizer[f"{master_of(fqn)}|ties"]
    return optimizer | {master_of(fqn): state[master_of(fqn)]}


def change_by_hand(training: Training) -> None:
    with torch.no_grad():
        training.model.layers[0].mlp.weight[3, 5] *= 1.01  # type: ignore[union-attr,index]


def test_a_weight_that_is_no_rounding_leaves_its_master_as_it_is(fast_directory: Path) -> None:
    training = new_training(fast_directory)
    training.train()
    change_by_hand(training)
    path = training.save().result()
    training.close()
    assert check_exact(path, layers_of(path)["layers.0"], training.states[1]) == {master_of("layers.0.back.weight")}
    assert_same(load(path, training).state(), training.states[1])


class TwoMasters(MasterAdamW):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step()
        for state in self.state.values():
            state["master"] = state[LEAF].clone()


@pytest.mark.parametrize("case", ["fp16", "fp32", "two masters", "a name like an array"])
def test_other_optimizer_files_are_the_bytes_they_were(fast_directory: Path, case: str) -> None:
    dtype = {"fp16": torch.float16, "fp32": torch.float32}.get(case, torch.bfloat16)
    training = new_training(fast_directory, dtype=dtype)
    if case == "two masters":
        training.optimizer = TwoMasters(training.model.parameters())
    training.train()
    if case == "a name like an array":
        for state in training.optimizer.state.values():
            state[f"{LEAF}|codes"] = torch.zeros(3)
    images = LiveReader().read(training.model, [training.optimizer]).images
    expected = {
        file.name: b"".join(bytes(part) if isinstance(part, memoryview) else _bytes(part) for part in file.parts)
        for image in images.values()
        for file in image.files
    }
    path = training.save().result()
    training.close()
    assert {name: (path / name).read_bytes() for name in expected} == expected


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


# Codes

ERRORS = {"q8": 2e-3, "q4": 1e-2, "compact": 2e-5, "compact4": 5e-4}
"""Relative errors of weights and masters that are allowed here."""
CODECS = {"q8": ("delta8", "round"), "q4": ("delta4", "round"), "compact": ("tail8", None), "compact4": ("tail4", None)}


def relative_error(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found.double() - true.double()).norm() / true.double().norm())


def check_near(found: Snapshot, true: Snapshot, limit: float) -> None:
    assert found.keys() == true.keys()
    for key, tensor in true.items():
        if key.endswith("exp_avg") or key.endswith("exp_avg_sq"):
            assert relative_error(found[key], tensor) < 0.3, key
        elif tensor.numel() < 4096 or key.endswith("seen"):
            assert_same({key: found[key]}, {key: tensor})
        else:
            assert relative_error(found[key], tensor) < limit, key


@pytest.mark.parametrize("leaf", ["master_param", "master"])
@pytest.mark.parametrize("rest", CODECS)
def test_masters_are_coded_and_weights_are_their_rounding(fast_directory: Path, rest: str, leaf: str) -> None:
    training = new_training(fast_directory, rest=rest, strategy=nothing, leaf=leaf)
    for _ in range(3):
        training.train()
        training.save()
    path = training.handles[-1].result()
    training.close()
    master_codec, weight_codec = CODECS[rest]
    for name, layer in layers_of(path).items():
        if name not in BLOCKS:
            continue
        assert layer.encoding is not None
        codecs = codecs_of(path, layer.encoding.codes.path)
        assert {codecs[master_of(f"{name}.{matrix}", leaf)] for matrix in LARGE} == {master_codec}
        assert {codecs.get(f"{name}.{matrix}") for matrix in LARGE} == {weight_codec}
        assert 0 < layer.encoding.errors["weights"].l2 < ERRORS[rest]
        if weight_codec is None:
            assert layer.encoding.base == "rounded"
            weights = {key: value for key, value in training.states[3].items() if key.startswith(f"{name}.")}
            assert_same(read_tensors(path / layer.weights.path), weights)
    found = load(path, training).state()
    check_near(found, training.states[3], ERRORS[rest])
    assert not weights_that_are_not_rounded_masters(found, leaf)


@pytest.mark.parametrize("rest", CODECS)
def test_the_errors_of_weights_are_those_of_masters_and_weights(fast_directory: Path, rest: str) -> None:
    training = new_training(fast_directory, rest=rest, strategy=nothing)
    for _ in range(2):
        training.train()
        training.save()
    path = training.handles[-1].result()
    training.close()
    found, true = load(path, training).state(), training.states[2]
    for name in BLOCKS:
        encoding = layers_of(path)[name].encoding
        assert encoding is not None
        keys = [master_of(f"{name}.{matrix}") for matrix in LARGE]
        if rest.startswith("q"):
            keys += [f"{name}.{matrix}" for matrix in LARGE]
        error = sum(float((found[key].double() - true[key].double()).square().sum()) for key in keys)
        norm = sum(float(true[key].double().square().sum()) for key in keys)
        assert encoding.errors["weights"].l2 == pytest.approx((error / norm) ** 0.5, rel=2e-3)
        largest = max(
            float((found[key].double() - true[key].double()).abs().max() / true[key].double().abs().max())
            for key in keys
        )
        assert encoding.errors["weights"].max == pytest.approx(largest, rel=2e-3)


@pytest.mark.parametrize("rest", CODECS)
def test_a_weight_changed_by_hand_is_kept_beside_its_master(fast_directory: Path, rest: str) -> None:
    training = new_training(fast_directory, rest=rest, strategy=nothing)
    training.train()
    training.save().result()
    training.train()
    change_by_hand(training)
    path = training.save().result()
    training.close()
    encoding = layers_of(path)["layers.0"].encoding
    assert encoding is not None
    codecs = codecs_of(path, encoding.codes.path)
    fqn = "layers.0.mlp.weight"
    relative, kept = (("delta8", "xor") if rest == "q8" else ("delta4", "xor")), ("exact", None)
    assert (codecs[master_of(fqn)], codecs.get(fqn)) == (relative if rest.startswith("q") else kept)
    found = load(path, training).state()
    check_near(found, training.states[2], ERRORS[rest])
    assert_same({fqn: found[fqn]}, {fqn: training.states[2][fqn]})
    assert weights_that_are_not_rounded_masters(found) == {fqn}


@pytest.mark.parametrize("rest", CODECS)
def test_fp16_weights_have_masters_too(fast_directory: Path, rest: str) -> None:
    training = new_training(fast_directory, rest=rest, strategy=nothing, dtype=torch.float16)
    for _ in range(2):
        training.train()
        training.save()
    path = training.handles[-1].result()
    training.close()
    encoding = layers_of(path)["layers.0"].encoding
    assert encoding is not None
    codecs = codecs_of(path, encoding.codes.path)
    fqn = "layers.0.mlp.weight"
    kept = ("exact", None)
    assert (codecs[master_of(fqn)], codecs.get(fqn)) == (CODECS[rest] if rest.startswith("q") else kept)
    found = load(path, training).state()
    check_near(found, training.states[2], ERRORS[rest])
    assert not weights_that_are_not_rounded_masters(found)


def test_a_master_that_was_not_there_before_is_kept(fast_directory: Path) -> None:
    """The exact files are of a step at which the parameter had no state."""
    training = new_training(fast_directory, rest="q8", strategy=nothing)
    training.backward()
    training.model.layers[0].mlp.weight.grad = None  # type: ignore[union-attr,index]
    training.optimizer.step()
    training.step = 1
    training.save().result()
    training.train()
    path = training.save().result()
    training.close()
    encoding = layers_of(path)["layers.0"].encoding
    assert encoding is not None
    assert codecs_of(path, encoding.codes.path)[master_of("layers.0.mlp.weight")] == "exact"
    check_near(load(path, training).state(), training.states[2], ERRORS["q8"])


@pytest.mark.parametrize("before", ["compact", "codes(weights=exact, first=int8, second=log8)"])
def test_without_exact_masters_there_is_no_base(fast_directory: Path, before: str) -> None:
    training = new_training(fast_directory, rest=before, strategy=nothing)
    for _ in range(2):
        training.train()
        training.save()
    training.close()
    training.checkpointer = Checkpointer(training.directory, rest="q8", strategy=nothing)
    training.checkpointer.begin(open_checkpoint(training.handles[-1].result()))
    training.train()
    path = training.save().result()
    training.close()
    for name in BLOCKS:
        layer = layers_of(path)[name]
        assert layer.reason == "no base"
        check_exact(path, layer, training.states[3])


class Wide(torch.nn.Module):
    """Nothing but large matrices, where bytes are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(64, 512)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(512, 512, bias=False) for _ in range(2))
        self.lm_head = torch.nn.Linear(512, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.lm_head(x)


BYTES = {None: 12, "q8": 3 + 8 / 64, "q4": 1.5 + 8 / 64, "compact": 5 + 6 / 64, "compact4": 3.5 + 6 / 64}


@pytest.mark.parametrize("rest", BYTES)
def test_bytes_per_parameter(fast_directory: Path, rest: str | None) -> None:
    training = new_training(fast_directory, rest=rest or "q8", strategy=nothing, model=Wide())
    training.train()
    training.save().result()
    training.train()
    path = training.handles[0].result() if rest is None else training.save().result()
    live = LiveReader().read(training.model, [training.optimizer]).images
    training.close()
    manifest = open_checkpoint(path).manifest
    for layer in manifest.layers:
        if layer.name.startswith("layers."):
            nbytes = layer.written_nbytes(manifest.step)
            assert nbytes / 512**2 == pytest.approx(BYTES[rest], abs=0.1)
            # It is known before, about.
            policy = parse_rest(rest)
            planned = live[layer.name] if policy is None else code_layer(live[layer.name], policy)
            assert planned is not None
            assert planned.nbytes == pytest.approx(nbytes, rel=0.05)


def test_without_packing_there_would_be_more_bytes(fast_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above sees it."""
    monkeypatch.setattr(packing, "split_master", lambda master, weight: None)
    training = new_training(fast_directory, model=Wide())
    training.train()
    path = training.save().result()
    training.close()
    assert layers_of(path)["layers.0"].nbytes / 512**2 == pytest.approx(14, abs=0.1)
