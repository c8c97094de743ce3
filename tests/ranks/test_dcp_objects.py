"""DCP (``save``, ``async_save``, ``load``) with our three objects: on several gloo ranks, and on one process."""

from __future__ import annotations

import enum
import hashlib
import json
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from typer.testing import CliRunner

from llmtailor.checkpoint import open_checkpoint
from llmtailor.cli.main import app
from llmtailor.errors import IncompatibleError, IntegrityError, InvalidInputError, QuarantineWarning, UnsupportedError
from llmtailor.integrations.dcp import TailorPlanner, TailorReader, TailorWriter
from llmtailor.load import plan_load
from llmtailor.model_state import read_model
from llmtailor.verify import verify_checkpoint
from ranks.launch import run_ranks
from ranks.loop_trainings import Model, digests

# DCP says so whenever there is no process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
PROGRAM = Path(__file__).parent / "dcp_trainings.py"
SAVED = {"parity": [2, 4, 6, 10, 12], "full": [3, 6], "titan": [1, 2], "ddp": [1, 2], "by-run": [1, 2]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dcp")
    run_ranks(PROGRAM, 2, "save", directory, timeout_secs=120)
    return directory


@pytest.fixture(scope="module")
def truth(saved: Path) -> Any:
    return json.loads((saved / "truth.json").read_text())


def expected_of(checkpoint: Path, truth: dict[str, dict[str, str]]) -> dict[str, str]:
    """What a composite holds, by the states that its training passed through."""
    manifest = open_checkpoint(checkpoint).manifest
    steps = {layer.name: layer.step for layer in manifest.layers}
    layer_of = {tensor.fqn: tensor.layer for tensor in manifest.tensors}
    names = truth[str(manifest.step)]
    fqns = {name: name if name in layer_of else name.removeprefix("state.").rpartition(".")[0] for name in names}
    return {name: truth[str(steps[layer_of[fqns[name]]])][name] for name in names}


# ---- Many ranks ----


def test_every_checkpoint_verifies(saved: Path) -> None:
    for run, steps in SAVED.items():
        assert sorted(int(path.name.split("-")[1]) for path in (saved / run).glob("checkpoint-*")) == steps
        for step in steps:
            report = verify_checkpoint(saved / run / f"checkpoint-{step}")
            assert report.problems == ()
            assert report.unlisted == ()


def test_a_training_goes_on_bit_for_bit(truth: Any) -> None:
    assert truth["resumed"] == truth["straight"]


def test_a_training_that_was_resumed_follows_what_it_loaded(saved: Path) -> None:
    first, second = (open_checkpoint(saved / "full" / f"checkpoint-{step}") for step in (3, 6))
    assert second.manifest.parent is not None
    assert second.manifest.parent.digest == first.digest
    assert second.manifest.run_id == first.manifest.run_id
    assert {layer.step for layer in second.manifest.layers} == {3, 6}


def test_layers_that_were_not_chosen_are_linked(saved: Path) -> None:
    run = saved / "parity"
    manifest = open_checkpoint(run / "checkpoint-6").manifest
    kept = [layer for layer in manifest.layers if layer.reason == "kept"]
    assert {layer.step for layer in kept} == {4}
    assert [layer.name for layer in kept] == ["embed", "layers.1"]
    for file in (file for layer in kept for file in layer.files):
        assert (run / "checkpoint-6" / file.path).samefile(run / "checkpoint-4" / file.path)


@pytest.mark.parametrize("num_ranks", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_checkpoints_are_loaded_on_any_number_of_ranks(saved: Path, truth: Any, num_ranks: int) -> None:
    run_ranks(PROGRAM, num_ranks, "load", saved, timeout_secs=120)
    found = json.loads((saved / f"loaded-{num_ranks}.json").read_text())
    for run in ("parity", "titan", "ddp", "by-run"):
        newest = saved / run / f"checkpoint-{SAVED[run][-1]}"
        assert found[run] == expected_of(newest, truth[run]), run
        assert len({layer.step for layer in open_checkpoint(newest).manifest.layers}) == 2
    assert found["titan-steps"] == [2, 2]


def test_a_rank_that_fails_publishes_nothing_and_the_next_save_works(saved: Path, truth: Any) -> None:
    assert truth["failure"] == {"1": "[Errno 5] a disk that fails"}
    before, after = truth["after_failure"]
    assert before == after
    assert "checkpoint-10" in truth["after_next"]
    assert truth["staging"] == ["lock"]
    # What was to be linked may be what failed.
    assert open_checkpoint(saved / "parity" / "checkpoint-10").manifest.is_consistent


def load_weights(checkpoint: Path, reader: Any) -> dict[str, str]:
    manifest = open_checkpoint(checkpoint).manifest
    state = {tensor.fqn: torch.zeros(tensor.shape) for tensor in manifest.tensors}
    dcp.load(state, storage_reader=reader)
    return digests(state)


def test_what_is_saved_is_what_was_there_when_it_was_staged(saved: Path, truth: Any) -> None:
    checkpoint = saved / "parity" / "checkpoint-6"
    expected = expected_of(checkpoint, truth["parity"])
    found = load_weights(checkpoint, TailorReader(checkpoint, model=""))
    assert found == {name: expected[name] for name in found}


def test_the_stock_reader_of_torch_reads_the_weights(saved: Path, truth: Any) -> None:
    checkpoint = saved / "parity" / "checkpoint-12"
    expected = expected_of(checkpoint, truth["parity"])
    found = load_weights(checkpoint, HuggingFaceStorageReader(str(checkpoint)))
    assert found == {name: expected[name] for name in found}
    assert len(found) > 15


def test_what_all_ranks_hold_is_in_whole_files(saved: Path) -> None:
    checkpoint = saved / "ddp" / "checkpoint-2"
    manifest = open_checkpoint(checkpoint).manifest
    assert manifest.world.sharding == "none"
    assert not any(layer.parts for layer in manifest.layers)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(tensor.fqn for tensor in manifest.tensors)
    assert {layer.reason for layer in manifest.layers} == {"strategy", "kept"}


def test_a_model_and_its_optimizer_load_what_was_saved(saved: Path, truth: Any) -> None:
    """As ``Run`` does it: kinds, groups and class of the optimizer are in the manifest."""
    model = Model()
    named = [*model.named_parameters()]
    groups = [{"params": [p for _, p in named if (p.ndim > 1) == is_matrix]} for is_matrix in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, foreach=False)
    plan_load(open_checkpoint(saved / "parity" / "checkpoint-10"), read_model(model), [optimizer]).fill()
    found = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, parameter in named:
        found |= {f"state.{name}.{leaf}": value for leaf, value in optimizer.state[parameter].items()}
    assert digests(found) == truth["parity"]["10"]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_commands_read_what_was_saved(saved: Path) -> None:
    runner = CliRunner()
    checkpoint = saved / "parity" / "checkpoint-12"
    for command in (["verify", str(checkpoint)], ["show", str(checkpoint)], ["ls", str(saved / "parity")]):
        result = runner.invoke(app, command)
        assert result.exit_code == 0, result.output


def flip(path: Path) -> None:
    """Change a bit of a file, and of no other name that it has."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.unlink()
    path.write_bytes(content)


def copy_run(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved / "parity", tmp_path / "run", ignore=shutil.ignore_patterns("_staging"))
    return tmp_path / "run"


def test_a_flipped_bit_is_refused_where_the_checkpoint_is_named(saved: Path, tmp_path: Path) -> None:
    checkpoint = copy_run(saved, tmp_path) / "checkpoint-12"
    flip(checkpoint / "model-head.rank-00001.safetensors")
    with pytest.raises(CheckpointException) as caught:
        load_weights(checkpoint, TailorReader(checkpoint, model=""))
    error = caught.value.failures[0][0]
    assert isinstance(error, IntegrityError)
    assert error.kind == "digest"


def test_a_run_falls_back_to_the_newest_checkpoint_that_verifies(saved: Path, tmp_path: Path, truth: Any) -> None:
    run = copy_run(saved, tmp_path)
    flip(run / "checkpoint-12" / "optimizer" / "head.rank-00001.safetensors")
    reader = TailorReader(run, model="")
    with pytest.warns(QuarantineWarning, match="checkpoint-12"):
        found = load_weights(run / "checkpoint-10", reader)
    assert reader.checkpoint is not None
    assert reader.checkpoint.path.name == "checkpoint-10"
    assert found == {name: truth["parity"]["10"][name] for name in found}
    assert (run / "checkpoint-12").is_dir()


# ---- One process ----


class Loop:
    """A training without ranks."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def step(self) -> None:
        self.model(torch.randint(0, 23, (2, 7))).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self, **rest: Any) -> dict[str, Any]:
        model, optim = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optim, **rest}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: value}
    return {name: each for key, below in items for name, each in flatten(below, f"{prefix}.{key}").items()}


def fingerprint(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: hashlib.sha256(value.numpy().tobytes()).hexdigest() if isinstance(value, torch.Tensor) else value
        for key, value in flatten(state).items()
    }


def test_all_of_a_state_dict_comes_back_with_its_types(tmp_path: Path) -> None:
    loop = Loop()
    loop.step()
    rest = {
        "lr": {"betas": (0.9, 0.95), "inf": float("inf")},
        "raw": b"\x00\xff",
        "seen": torch.arange(7),
        "none": None,
    }
    planner = TailorPlanner()
    writer = TailorWriter(tmp_path / "run", planner)
    expected = fingerprint(loop.state(rest=rest))
    dcp.save(loop.state(rest=rest), checkpoint_id="step-1", storage_writer=writer, planner=planner)
    writer.close()
    other = Loop()
    other.step(), other.step()
    empty = {"lr": {"betas": 0, "inf": 0}, "raw": 0, "seen": torch.zeros(7, dtype=torch.int64), "none": 0}
    state = other.state(rest=empty)
    assert fingerprint(state) != expected
    dcp.load(state, storage_reader=TailorReader(tmp_path / "run"))
    assert fingerprint(state) == expected


def test_only_chosen_layers_are_staged(tmp_path: Path) -> None:
    loop = Loop()
    planner = TailorPlanner("parity")
    writer = TailorWriter(tmp_path / "run", planner)
    for step in (1, 2):
        loop.step()
        writer.step = step
        dcp.async_save(loop.state(), storage_writer=writer, planner=planner).result()  # type: ignore[union-attr]
    loop.step()
    writer.step = 3
    (staged,) = writer.stage(loop.state()).values()
    copied = {part.layer for part in staged.named.parts.values() if not part.local.tensor.is_meta}
    assert copied == {"layers.0", "layers.2", "norm", "head", "scale"}
    writer.step = None
    (staged,) = writer.stage(loop.state()).values()
    assert all(not part.local.tensor.is_meta for part in staged.named.parts.values())
    writer.close()


def test_what_is_staged_shares_no_memory_with_what_is_live_or_in_use(tmp_path: Path) -> None:
    loop = Loop()
    planner = TailorPlanner()
    writer = TailorWriter(tmp_path / "run", planner)
    loop.step()
    dcp.save(loop.state(), checkpoint_id="1", storage_writer=writer, planner=planner)
    writer.step = 2
    dcp.async_save(loop.state(), storage_writer=writer, planner=planner).result()  # type: ignore[union-attr]
    writer.step = 3
    first, second = (next(iter(writer.stage(loop.state()).values())) for _ in range(2))
    live = {tensor.data_ptr() for tensor in flatten(loop.state()).values() if isinstance(tensor, torch.Tensor)}
    held = [{part.local.tensor.data_ptr() for part in each.named.parts.values()} for each in (first, second)]
    assert len(live) == len(held[0]) == len(held[1])
    assert live.isdisjoint(held[0] | held[1])
    assert held[0].isdisjoint(held[1])
    writer.close()


def test_numbers_in_an_optimizers_state_are_those_of_their_layer(tmp_path: Path) -> None:
    planner = TailorPlanner("parity")
    writer = TailorWriter(tmp_path / "run", planner)
    for step in (1, 2, 3):
        state = {name: {"count": step, "mean": torch.full((2,), float(step))} for name in ("a.0.w.x", "a.1.w.x")}
        model = {"a.0.w.x": torch.full((2,), float(step)), "a.1.w.x": torch.full((2,), float(step))}
        optim = {"state": state, "param_groups": [{"lr": 0.1, "params": [*model]}]}
        dcp.save({"model": model, "optim": optim}, checkpoint_id=f"{step}", storage_writer=writer, planner=planner)
    writer.close()
    dcp.load({"optim": optim, "model": model}, storage_reader=TailorReader(tmp_path / "run"))
    assert {name: (each["count"], each["mean"][0].item()) for name, each in state.items()} == {
        "a.0.w.x": (3, 3.0),
        "a.1.w.x": (2, 2.0),
    }


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    weight = torch.arange(6.0).view(2, 3)
    planner = TailorPlanner()
    with_tie = {"model": {"embed.weight": weight, "a.0.w.weight": torch.ones(2), "lm_head.weight": weight.detach()}}
    writer = TailorWriter(tmp_path / "run", planner)
    dcp.save(with_tie, checkpoint_id="1", storage_writer=writer, planner=planner)
    writer.close()
    manifest = open_checkpoint(tmp_path / "run" / "checkpoint-1").manifest
    assert {tensor.fqn: tensor.tied_to for tensor in manifest.tensors}["lm_head.weight"] == "embed.weight"
    empty = {"model": {name: torch.zeros_like(tensor) for name, tensor in with_tie["model"].items()}}
    dcp.load(empty, storage_reader=TailorReader(tmp_path / "run"))
    assert torch.equal(empty["model"]["lm_head.weight"], weight)


def failure_of(save: Any) -> BaseException:
    with pytest.raises(CheckpointException) as caught:
        save()
    error: BaseException = caught.value.failures[0][0]
    return error


@pytest.mark.parametrize(
    ("state", "kind", "error"),
    [
        ({"model": {"w.weight": torch.ones(2)}, "x": pytest.approx}, "object-state", UnsupportedError),
        ({"train": {"step": torch.tensor(1)}}, "no-model", IncompatibleError),
        (
            {
                "model": {"w.weight": torch.ones(2)},
                "optim": {"state": {0: {"m": torch.ones(2)}}, "param_groups": [{"params": [0]}]},
            },
            "unnamed-state",
            IncompatibleError,
        ),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, state: Any, kind: str, error: type[Exception]) -> None:
    planner = TailorPlanner()
    writer = TailorWriter(tmp_path / "run", planner)
    found = failure_of(lambda: dcp.save(state, checkpoint_id="1", storage_writer=writer, planner=planner))
    writer.close()
    assert isinstance(found, error)
    assert found.kind == kind
    assert not [*(tmp_path / "run").glob("checkpoint-*")]


def test_a_save_without_a_step_or_of_an_earlier_one_is_refused(tmp_path: Path) -> None:
    loop = Loop()
    planner = TailorPlanner()
    writer = TailorWriter(tmp_path / "run", planner)

    def save(checkpoint_id: str | None) -> None:
        dcp.save(loop.state(), checkpoint_id=checkpoint_id, storage_writer=writer, planner=planner)

    with pytest.raises(InvalidInputError, match="does not say its step"):
        save("newest")
    found = failure_of(lambda: save(None))
    assert getattr(found, "kind", None) == "unknown-step"
    save("step-5")
    found = failure_of(lambda: save("step-5"))
    assert getattr(found, "kind", None) == "step-order"
    writer.close()


def test_a_run_of_another_training_is_set_aside(tmp_path: Path) -> None:
    for _ in range(2):
        planner = TailorPlanner("parity")
        writer = TailorWriter(tmp_path / "run", planner)
        dcp.save(Loop().state(), checkpoint_id="step-1", storage_writer=writer, planner=planner)
        writer.close()
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["_checkpoint-1.superseded", "_staging", "checkpoint-1"]
    assert open_checkpoint(tmp_path / "run" / "checkpoint-1").manifest.is_consistent


def composed(checkpoint: Path, states: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Each layer as it was at the step that the checkpoint says."""
    manifest = open_checkpoint(checkpoint).manifest
    steps = {layer.name: layer.step for layer in manifest.layers}
    assert set(steps.values()) == {*states}
    found = dict(states[manifest.step])
    for tensor in manifest.tensors:
        for key in found:
            if key == f".model.{tensor.fqn}" or key.startswith(f".optim.state.{tensor.fqn}."):
                found[key] = states[steps[tensor.layer]][key]
    return found


def read_guide(fence: str, run: Path) -> str:
    """A program of the guide, for a directory of ours; the page is run as a whole by ``test_guides``."""
    text = (Path(__file__).parents[2] / "docs" / "frameworks" / "dcp.md").read_text()
    program = next(block for block in text.split(f"```{fence}\n")[1:] if "TailorPlanner(" in block.split("```")[0])
    return program.split("```")[0].replace('"runs/dcp"', repr(str(run)))


def test_the_guide_saves_and_resumes(tmp_path: Path) -> None:
    loop = Loop()
    scheduler = torch.optim.lr_scheduler.LinearLR(loop.optimizer, total_iters=10)
    known: dict[str, Any] = {
        "model": loop.model,
        "optimizer": loop.optimizer,
        "scheduler": scheduler,
        "group": None,
    }
    exec(read_guide("python", tmp_path / "a"), known)
    loop.step(), scheduler.step()
    states = {1: fingerprint(known["read_state"]())}
    known["save"](1)
    loop.step(), scheduler.step()
    states[2] = fingerprint(known["read_state"]())
    known["save_while_training"](2).result()
    known["writer"].close()
    loop.step(), scheduler.step()
    known["resume"]()
    assert fingerprint(known["read_state"]()) == composed(tmp_path / "a" / "checkpoint-2", states)
    assert known["reader"].checkpoint.path == tmp_path / "a" / "checkpoint-2"


class StandIn:
    """What the guide overrides of torchtitan, which is not installed here.

    Source: torchtitan, components/checkpointer/dcp.py (CheckpointManager), 2026-10.
    """

    enable = True
    pg = None

    def __init__(self, folder: str, states: dict[str, Any]) -> None:
        self.folder, self.states = folder, states

    def flattened(self) -> dict[str, Any]:
        others = {key: value for key, value in self.states.items() if key != "model"}
        return others | self.states["model"].state_dict()

    def save(self, step: int, mode: str) -> Any:
        states = {key: value for key, value in self.states.items() if key != "model"} | self.states[
            "model"
        ].state_dict()
        return self.dcp_save(states, self._create_checkpoint_id(step), mode)  # type: ignore[attr-defined]

    def load(self) -> None:
        steps = [found[0] for name in os.listdir(self.folder) if (found := self._parse_step(name))]  # type: ignore[attr-defined]
        checkpoint_id = self._create_checkpoint_id(max(steps))  # type: ignore[attr-defined]
        assert self._is_valid_checkpoint(checkpoint_id)  # type: ignore[attr-defined]
        states = {key: value for key, value in self.states.items() if key != "model"} | self.states[
            "model"
        ].state_dict()
        self.dcp_load(states, checkpoint_id, from_hf=False, from_quantized=False)  # type: ignore[attr-defined]

    def _close(self) -> None:
        pass


class FlatOptimizer:
    """As torchtitan's OptimizersContainer."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.loop.model, self.loop.optimizer, options=FLAT)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.loop.model, self.loop.optimizer, state, options=FLAT)


class Weights:
    """As torchtitan's ModelWrapper, which takes a dict of more than the model."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.loop.model)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        set_model_state_dict(self.loop.model, own)


def test_the_guide_overrides_torchtitans_checkpointer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torchtitan.components.checkpointer.dcp")
    module.__dict__.update(CheckpointManager=StandIn, AsyncMode=enum.StrEnum("AsyncMode", ["DISABLED", "ASYNC"]))
    monkeypatch.setitem(sys.modules, "torchtitan.components.checkpointer.dcp", module)
    known: dict[str, Any] = {"__name__": "guide"}
    exec(read_guide("py", tmp_path), known)
    loop = Loop()
    manager = known["TailorCheckpointManager"](
        str(tmp_path / "run"), {"optimizer": FlatOptimizer(loop), "model": Weights(loop)}
    )
    loop.step()
    states = {1: fingerprint(loop.state())}
    manager.save(1, "disabled")
    loop.step()
    states[2] = fingerprint(loop.state())
    manager.save(2, "async").result()
    manager._close()
    manifest = open_checkpoint(tmp_path / "run" / "checkpoint-2").manifest
    assert [len(optimizer.groups) for optimizer in manifest.optimizers] == [1]
    assert manifest.parent is not None
    loop.step()
    manager.load()
    assert fingerprint(loop.state()) == composed(tmp_path / "run" / "checkpoint-2", states)
