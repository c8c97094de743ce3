"""What is read of real ZeRO engines, and what trainings make of it that resume from it."""

from __future__ import annotations

import functools
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmtailor.errors import IncompatibleError
from llmtailor.formats.deepspeed.partitions import cut_evenly
from llmtailor.formats.safetensors import read_header
from llmtailor.formats.tailored import open_layer_file, read_notes
from llmtailor.shards import whole_shard
from llmtailor.state_keys import split_state_key
from llmtailor.zero.flats import Flat, cut, read_state
from llmtailor.zero.steps import moment_factors, unify
from merge.deepspeed_stock import read_consolidated
from ranks.zero_states import Job, assemble, run_jobs

pytestmark = pytest.mark.timeout(300)

CASES: dict[str, dict[str, Any]] = {
    "1-fp32": {"stage": 1, "dtype": "fp32"},
    "1-bf16": {"stage": 1, "layer_groups": True},
    "2-bf16-round-robin": {"stage": 2, "layer_groups": True, "zero": {"round_robin_gradients": True}},
    "2-fp32-round-robin-sgd": {
        "stage": 2,
        "dtype": "fp32",
        "optimizer": "sgd",
        "zero": {"round_robin_gradients": True},
    },
    "2-fp16": {"stage": 2, "dtype": "fp16"},
    "3-bf16": {"stage": 3, "layer_groups": True, "zero": {"stage3_param_persistence_threshold": 0}},
    "3-bf16-persistent": {"stage": 3, "zero": {"sub_group_size": 60}},
    "3-fp32": {"stage": 3, "dtype": "fp32", "zero": {"sub_group_size": 60, "stage3_param_persistence_threshold": 20}},
}
SLOW_CASES: dict[str, dict[str, Any]] = {
    "1-bf16-aligned": {"stage": 1, "zero": {"parameter_alignment": True}},
    "1-bf16-optimizer": {"stage": 1, "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
    "2-bf16": {"stage": 2},
    "3-fp16": {"stage": 3, "dtype": "fp16", "layer_groups": True},
    "3-bf16-sgd": {"stage": 3, "optimizer": "sgd"},
}
if shutil.which("g++") and shutil.which("ninja"):
    _adam = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}}
    SLOW_CASES["2-bf16-fused"] = {"stage": 2, "optimizer": "config", "config": _adam}
    SLOW_CASES["3-bf16-offload"] = {
        "stage": 3,
        "optimizer": "config",
        "zero": {"offload_optimizer": {"device": "cpu"}},
        "config": _adam,
    }
USED = ["2-fp16", "3-bf16-persistent"]
# From a world of how many ranks into another; each pair of ranks is a launch.
RESHARDED = ["1-bf16", "2-bf16-round-robin", "3-bf16", "3-fp32"]


class Runs:
    """The jobs of all cases: read on so many ranks, and resumed on as many or others."""

    def __init__(self, root: Path, cases: dict[str, dict[str, Any]]) -> None:
        self.root = root
        self.cases = cases

    def read(self, name: str, ranks: int) -> Job:
        return Job(out=str(self.root / f"{name}-on-{ranks}"), **self.cases[name])

    def resumed(self, name: str, ranks: int, onto: int) -> Job:
        read = self.read(name, ranks)
        return replace(read, out=f"{read.out}-onto-{onto}", source=read.out)

    def resumed_in_use(self, name: str, ranks: int) -> Job:
        read = self.read(name, ranks)
        return replace(read, out=f"{read.out}-in-use", source=read.out, is_used=True)

    def launch(self, jobs: list[Job], ranks: int) -> None:
        run_jobs(jobs, ranks=ranks, scratch=self.root)


def load(job: Job, when: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(job.file(when), weights_only=False)
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    differing = [name for name, tensor in one.items() if not _is_same(tensor, other[name])]
    assert not differing


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool(torch.equal(one, other))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("zero"), CASES)
    runs.launch([runs.read(name, 3) for name in RESHARDED], 3)
    # What is compared bit for bit runs one after the other: the first engine of stage 3 exchanges torch's ``linear``
    # for good. Source: DeepSpeed 0.19.8, runtime/zero/partition_parameters.py (zero3_linear_wrap).
    jobs = []
    for name in CASES:
        jobs += [runs.read(name, 2), runs.resumed(name, 2, 2)]
        jobs += [runs.resumed_in_use(name, 2)] if name in USED else []
    runs.launch([*jobs, *(runs.resumed(name, 3, 2) for name in RESHARDED)], 2)
    runs.launch([runs.resumed(name, 2, 3) for name in RESHARDED], 3)
    runs.launch([runs.resumed(name, 2, 1) for name in RESHARDED], 1)
    return runs


def check_truth(job: Job) -> None:
    """That the runs of each name tile it, ``assemble`` has checked."""
    read = load(job, "start")
    weights = {name: tensor for name, tensor in read["tensors"].items() if not name.startswith("state.")}
    states = {name: tensor for name, tensor in read["tensors"].items() if name not in weights}
    buffers = {f"layers.{index}.scale" for index in (0, 1)}
    assert weights.keys() == {*read["live"], *buffers}
    assert_same({name: weights[name] for name in read["live"]}, read["live"])
    trained = {fqn for group in read["groups"] for fqn in group.parameters}
    assert trained == {name for name in read["live"] if "frozen" not in name}
    leaves = {name.rpartition(".")[2] for name in states}
    assert leaves - {"master", "step"} in ({"exp_avg", "exp_avg_sq"}, {"momentum_buffer"})
    assert ("master" in leaves) == (job.dtype != "fp32")
    if job.dtype == "fp32":
        states |= {f"state.{fqn}.master": weights[fqn] for fqn in trained}
    truth = {name: tensor for name, tensor in states.items() if name.endswith(".step")}
    truth |= read["full"] or read_stock(job, leaves | {"master"})
    assert_same(states, {name: truth[name] for name in states})


def read_stock(job: Job, leaves: set[str]) -> dict[str, torch.Tensor]:
    """What DeepSpeed saved, put together by DeepSpeed."""
    found = {}
    for leaf in leaves - {"step"}:
        tensors = read_consolidated(job.stock / "stock", None if leaf == "master" else leaf)
        found.update({f"state.{fqn}.{leaf}": tensor for fqn, tensor in tensors.items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_the_ranks_hold_is_what_deepspeed_saves(runs: Runs, name: str) -> None:
    check_truth(runs.read(name, 2))
    if name in RESHARDED:
        check_truth(runs.read(name, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_training_goes_on_bit_for_bit(runs: Runs, name: str) -> None:
    check_resumed(runs.read(name, 2), runs.resumed(name, 2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", USED)
def test_an_engine_that_has_trained_forgets_it(runs: Runs, name: str) -> None:
    check_resumed(runs.read(name, 2), runs.resumed_in_use(name, 2))


def check_resumed(job: Job, resumed: Job) -> None:
    check_loaded(job, resumed)
    through, end = load(job, "end"), load(resumed, "end")
    assert end["losses"] == through["losses"]
    for what in ("tensors", "live", "full"):
        assert_same(end[what], through[what])
    for what in ("rest", "notes", "groups", "layout", "parts"):
        assert end[what] == through[what], what


def check_loaded(job: Job, resumed: Job) -> None:
    read, loaded = load(job, "start"), load(resumed, "start")
    for what in ("tensors", "live", "full"):
        assert_same(loaded[what], read[what])
    for what in ("rest", "notes", "groups", "metas"):
        assert loaded[what] == read[what], what


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "onto"), [(2, 3), (3, 2), (2, 1)])
@pytest.mark.parametrize("name", RESHARDED)
def test_another_world_holds_the_same(runs: Runs, name: str, ranks: int, onto: int) -> None:
    resumed = runs.resumed(name, ranks, onto)
    check_loaded(runs.read(name, ranks), resumed)
    assert load(resumed, "start")["layout"] != load(runs.read(name, ranks), "start")["layout"]
    if onto == 1:
        read = load(resumed, "start")
        (parts,) = read["parts"]
        assert all(parts[name] == whole_shard(meta.shape) for name, meta in read["metas"].items())


@pytest.mark.slow
def test_what_is_read_is_spread_where_it_should_be(runs: Runs) -> None:
    weights, moments = "layers.0.up.weight", "state.layers.0.up.weight.exp_avg"
    for name, are_spread in (("1-bf16", {moments}), ("3-bf16", {weights, moments})):
        parts = load(runs.read(name, 3), "start")["parts"]
        for tensor in (weights, moments):
            held = [each[tensor] for each in parts if tensor in each]
            assert all(shard.is_run == (tensor in are_spread) for shard in held)
            assert tensor in are_spread or len(held) == 3
        assert sum("state.layers.0.up.weight.step" in each for each in parts) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [*((name, 2) for name in CASES), *((name, 3) for name in RESHARDED)])
def test_the_files_of_all_ranks_hold_everything_once(runs: Runs, name: str, ranks: int) -> None:
    check_files(runs.read(name, ranks), ranks)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESHARDED)
def test_a_rank_that_is_alone_writes_whole_files(runs: Runs, name: str) -> None:
    job = runs.resumed(name, 2, 1)
    check_files(job, 1)
    assert not [*job.files.rglob("*.rank-*")]


def check_files(job: Job, ranks: int) -> None:
    facts = [json.loads((job.files / str(rank) / "facts.json").read_text()) for rank in range(ranks)]
    assert all(each == facts[0] for each in facts)
    read = load(job, "start")
    by_kind: dict[str, list[dict[str, Any]]] = {"weights": [], "optimizer": []}
    whole, notes = set(), {}
    for path in sorted(job.files.rglob("*.safetensors")):
        suffix = f".rank-{int(path.relative_to(job.files).parts[0]):05d}.safetensors"
        kind = "optimizer" if path.parent.name == "optimizer" else "weights"
        if is_whole := ".rank-" not in path.name:
            assert path.name not in whole, "two ranks write one file"
            whole.add(path.name)
        assert is_whole or path.name.endswith(suffix)
        with path.open("rb") as opened:
            header, _ = read_header(opened.fileno(), path)
        file = open_layer_file(path, header, is_part=not is_whole)
        notes.update(read_notes(path, header))
        by_kind[kind].append({name: (tensor, file.shards[name]) for name, tensor in load_file(path).items()})
        # Files of a layer hold what is the layer's.
        layer = path.name.split(".rank-")[0].removeprefix("model-").removesuffix(".safetensors")
        fqns = facts[0]["layers"][layer.replace(".00", ".")]
        assert {name if kind == "weights" else split_state_key(name)[0] for name in header.tensors} <= {*fqns}
    found = {}
    for kind, parts in by_kind.items():
        metas = {
            name: each for name, each in read["metas"].items() if name.startswith("state.") == (kind == "optimizer")
        }
        # Exactly once, also what all ranks hold.
        assert {name for each in parts for name in each} == {*metas}
        numels = Counter[str]()
        for each in parts:
            numels.update({name: tensor.numel() for name, (tensor, _) in each.items()})
        assert numels == {name: meta.numel for name, meta in metas.items()}
        found |= assemble(metas, parts)
    assert_same(found, read["tensors"])
    assert notes == read["notes"]
    assert sum(facts[0]["nbytes"].values()) == sum(tensor.nbytes for tensor in found.values())
    schema = {record["fqn"]: (record["dtype"], tuple(record["shape"])) for record in facts[0]["tensors"]}
    weights = {name: meta for name, meta in read["metas"].items() if not name.startswith("state.")}
    assert schema == {name: (meta.dtype, meta.shape) for name, meta in weights.items()} | {
        "lm_head.weight": schema["embed_tokens.weight"]
    }
    assert facts[0]["layout"] == (read["layout"] if ranks > 1 else None)


@pytest.mark.slow
def test_the_loss_scale_and_the_schedule_are_kept(runs: Runs) -> None:
    rest = load(runs.read("2-fp16", 2), "start")["rest"]
    assert rest["loss_scaler"]["dynamic"]
    assert rest["loss_scaler"]["cur_iter"] == rest["global_steps"] == rest["micro_steps"] == 3
    assert rest["lr_scheduler"] == {"last_batch_iteration": 2}


@pytest.fixture(scope="module")
def slow_runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("slow-zero"), SLOW_CASES)
    for ranks in (2, 3):
        jobs = [job for name in SLOW_CASES for job in (runs.read(name, ranks), runs.resumed(name, ranks, ranks))]
        run_jobs(jobs, ranks=ranks, scratch=runs.root, timeout_secs=900)
    return runs


@pytest.mark.slow
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", SLOW_CASES)
def test_rarer_engines_are_read_and_resumed(slow_runs: Runs, name: str, ranks: int) -> None:
    job = slow_runs.read(name, ranks)
    check_truth(job)
    check_files(job, ranks)
    check_resumed(job, slow_runs.resumed(name, ranks, ranks))


ADAM = {"betas": {"tuple": [0.9, 0.99]}}


def make_flat(**tensors: torch.Tensor) -> Flat:
    shapes = {"a": (3, 2), "b": (5,)}
    partition = torch.arange(6.0)
    layout = cut_evenly([("a", 6), ("b", 5)], [0, 0], 2)
    return Flat(group=0, shapes=shapes, paddings=(0, 0), layout=layout, rank=1, master=partition, weights=partition)


def test_a_cut_shares_memory_and_leaves_padding_out() -> None:
    flat = make_flat()
    parts = cut(flat, flat.master)
    assert {fqn: part.shard.offsets + part.shard.sizes for fqn, part in parts.items()} == {"b": (0, 5)}
    parts["b"].tensor[0] = 9
    assert flat.master.tolist() == [9, 1, 2, 3, 4, 5]


def test_numbers_of_a_flat_are_told_from_its_tensors() -> None:
    flat = make_flat()
    state = read_state(flat, {"step": 4, "exp_avg": torch.zeros(6), "sum": torch.tensor(2.0), "none": None})
    assert [*state.tensors] == ["exp_avg"]
    assert {leaf: number.item() for leaf, number in state.numbers.items()} == {"step": 4, "sum": 2.0}
    assert state.notes == {"step": "int"}


@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(2, 3), "fast"])
def test_state_that_mixes_parameters_is_refused(value: object) -> None:
    with pytest.raises(NotImplementedError, match="cannot be told apart"):
        read_state(make_flat(), {"odd": value})


def test_steps_that_differ_become_the_largest_one() -> None:
    numbers = {"a": {"step": torch.tensor(2.0)}, "b": {"step": torch.tensor(5.0)}}
    moments = {leaf: {"a": torch.ones(3), "b": torch.ones(2)} for leaf in ("exp_avg", "exp_avg_sq")}
    found = unify(numbers, moments, ADAM)
    assert found["step"][0] == "b"
    assert found["step"][1] == 5
    for leaf, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.99)):
        corrected = [moments[leaf][fqn] / (1 - beta**5) for fqn in "ab"]
        torch.testing.assert_close(corrected[0], torch.ones(3) / (1 - beta**2))
        assert torch.equal(corrected[1], torch.ones(2) / (1 - beta**5))


def test_steps_that_differ_need_betas() -> None:
    make = functools.partial(moment_factors, ["exp_avg", "exp_avg_sq"], own=2.0, common=5.0)
    assert make({**ADAM, "bias_correction": False}) == {}
    with pytest.raises(IncompatibleError, match="without the betas"):
        make({})
