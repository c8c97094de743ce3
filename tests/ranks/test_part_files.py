"""Checkpoints whose layers are in parts: any cut comes back as any other, and what does not fit is refused."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from faults import flip_bit, overwrite
from llmtailor.checkpoint import Checkpoint, open_checkpoint
from llmtailor.checkpointer import Checkpointer
from llmtailor.errors import FormatError, IncompatibleError, IncompleteError, IntegrityError, NotFoundError
from llmtailor.formats.tailored.shards import DCP_KEY, SHARDS_KEY
from llmtailor.load import Target, load_model, load_optimizers, plan_load, plan_targets, read_saved_states
from llmtailor.manifest import MANIFEST_NAME, FileRecord, digest_of, encode_manifest
from llmtailor.model_state import read_model
from llmtailor.shards import Shard, whole_shard
from llmtailor.state_keys import NOTES_KEY, state_key
from llmtailor.verify import verify_checkpoint
from ranks.part_files import (
    CUTS,
    Cut,
    Mixed,
    PartFile,
    boxes,
    columns,
    cut_checkpoint,
    cut_file,
    make_optimizer,
    runs,
    save_whole,
    scattered,
    take,
    train,
    with_metadata,
    with_shard,
    without,
)
from tiny_models import assert_same, snapshot_model, snapshot_optimizer

Tensors = dict[str, torch.Tensor]

cuts = st.one_of(st.sampled_from([*CUTS.values()]), st.integers(0, 2**32).map(scattered))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return save_whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def tensors(whole: Checkpoint) -> Tensors:
    """Every tensor of the checkpoint, by its name in the files."""
    files = [file for layer in whole.manifest.layers for file in layer.plain_files]
    return {name: tensor for file in files for name, tensor in load_file(whole.path / file.path).items()}


def make_targets(tensors: Mapping[str, torch.Tensor], cut: Cut) -> dict[str, list[Target]]:
    """Memory for all ranks of a world, full of sevens."""
    targets = {}
    for name, tensor in tensors.items():
        shards = cut(name, tuple(tensor.shape)) if tensor.ndim and tensor.numel() else [whole_shard(tensor.shape)] * 2
        targets[name] = [
            Target(tensor=torch.full(shard.sizes, 7).to(tensor.dtype), shard=shard) for shard in shards if shard
        ]
    return targets


def assert_filled(targets: Mapping[str, list[Target]], tensors: Tensors) -> None:
    found = {f"{name} {index}": each.tensor for name, held in targets.items() for index, each in enumerate(held)}
    expected = {
        f"{name} {index}": take(tensors[name], each.shard)
        for name, held in targets.items()
        for index, each in enumerate(held)
    }
    assert_same(found, expected)


# Any cut into any other


@settings(max_examples=60)
@given(saved=cuts, wanted=cuts)
def test_any_cut_is_loaded_as_any_other(whole: Checkpoint, tensors: Tensors, saved: Cut, wanted: Cut) -> None:
    targets = make_targets(tensors, wanted)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = cut_checkpoint(whole, Path(directory) / "checkpoint-7", saved)
        assert verify_checkpoint(checkpoint.path).problems == ()
        plan_targets(checkpoint, targets).fill()
    assert_filled(targets, tensors)


@pytest.mark.parametrize("wanted", CUTS.values(), ids=CUTS)
def test_whole_files_are_loaded_in_any_cut(whole: Checkpoint, tensors: Tensors, wanted: Cut) -> None:
    targets = make_targets(tensors, wanted)
    plan_targets(whole, targets).fill()
    assert_filled(targets, tensors)


@pytest.mark.parametrize("kinds", [("weights", "optimizer"), ("optimizer",)], ids=["all in parts", "state in parts"])
@pytest.mark.parametrize("saved", CUTS.values(), ids=CUTS)
def test_a_model_that_is_not_cut_is_loaded_from_parts(
    whole: Checkpoint, tmp_path: Path, saved: Cut, kinds: tuple[str, ...]
) -> None:
    checkpoint = cut_checkpoint(whole, tmp_path / "checkpoint-7", saved, kinds=kinds)
    model, optimizer = train(2)
    plan_load(checkpoint, read_model(model), [optimizer]).fill()
    expected_model, expected = train(1)
    assert_same(snapshot_model(model), snapshot_model(expected_model))
    assert_same(snapshot_optimizer(model, optimizer), snapshot_optimizer(expected_model, expected))


def test_targets_are_filled_on_their_strides(whole: Checkpoint, tmp_path: Path, tensors: Tensors) -> None:
    checkpoint = cut_checkpoint(whole, tmp_path / "checkpoint-7", boxes(2))
    shape = (5, 3)
    shard = Shard(shape=(3, 5), offsets=(0, 0), sizes=(3, 5))
    transposed = Target(tensor=torch.zeros(shape).t(), shard=shard)
    plan_targets(checkpoint, {"layers.0.weight": [transposed]}).fill()
    assert torch.equal(transposed.tensor, tensors["layers.0.weight"])


def test_files_without_anything_that_is_wanted_are_not_read(whole: Checkpoint, tmp_path: Path) -> None:
    checkpoint = cut_checkpoint(whole, tmp_path / "checkpoint-7", boxes(3))
    wanted = Shard(shape=(11, 7), offsets=(4, 0), sizes=(2, 7))
    target = Target(tensor=torch.zeros(2, 7, dtype=torch.bfloat16), shard=wanted)
    read: list[FileRecord] = []
    plan_targets(checkpoint, {"first.weight": [target]}).fill(read.append)
    assert [file.path for file in read] == ["model-first.rank-00001.safetensors"]


def test_whoever_wants_nothing_of_a_layer_still_has_its_state(whole: Checkpoint, tmp_path: Path) -> None:
    states = read_saved_states(cut_checkpoint(whole, tmp_path / "checkpoint-7", runs(5)))
    assert states == read_saved_states(whole)
    assert states["cube"].notes == {"count": "int", "mode": {"str": "fast"}}
    assert states["cube"].metas["exp_avg"].shape == (3, 5, 2)
    assert "frozen" not in states


@pytest.mark.parametrize("saved", [columns(3), boxes(2)], ids=["columns", "rows"])
def test_several_places_take_one_tensor(whole: Checkpoint, tmp_path: Path, tensors: Tensors, saved: Cut) -> None:
    checkpoint = cut_checkpoint(whole, tmp_path / "checkpoint-7", saved)
    shards = [whole_shard((3, 5, 2)), Shard(shape=(3, 5, 2), offsets=(11,), sizes=(13,), is_run=True)]
    targets = {"cube": [Target(tensor=torch.zeros(shard.sizes), shard=shard) for shard in shards]}
    plan_targets(checkpoint, targets).fill()
    assert_filled(targets, tensors)


def test_a_target_that_does_not_fit_is_refused(whole: Checkpoint) -> None:
    def target(dtype: torch.dtype, shape: tuple[int, ...]) -> list[Target]:
        return [Target(tensor=torch.zeros(shape, dtype=dtype), shard=whole_shard(shape))]

    with pytest.raises(IncompatibleError, match="another element type"):
        plan_targets(whole, {"first.weight": target(torch.float32, (11, 7))})
    with pytest.raises(IncompatibleError, match="another element type or shape"):
        plan_targets(whole, {"first.weight": target(torch.bfloat16, (7, 11))})
    for name in ("first.other", "state.first.weight.other", "state.other.step"):
        with pytest.raises(IncompatibleError) as caught:
            plan_targets(whole, {name: target(torch.float32, ())})
        assert isinstance(caught.value, IncompleteError) or name == "first.other"


# Damage


Mistake = Callable[[str, PartFile], PartFile | bytes | None]
WEIGHTS, STATE = "model-cube.rank-00001.safetensors", "optimizer/cube.rank-00001.safetensors"
EXP_AVG = state_key("cube", "exp_avg")


def at(path: str, mistake: Callable[[PartFile], PartFile | bytes | None]) -> Mistake:
    return lambda name, file: mistake(file) if name == path else file


def told(**fields: Any) -> Callable[[PartFile], bytes]:
    """Other words about the one tensor of the weights file."""

    def change(file: PartFile) -> bytes:
        return with_metadata(file, **{SHARDS_KEY: json.dumps(fields)})

    return change


def box(start: int, count: int) -> Shard:
    return Shard(shape=(3, 5, 2), offsets=(start, 0, 0), sizes=(count, 5, 2))


ones, rank_of = torch.ones(3, 5, 2), {"shape": [3, 5, 2], "offsets": [1, 0, 0]}
MISTAKES: dict[str, Mistake] = {
    "a shard is missing": at(WEIGHTS, lambda file: without(file, "cube")),
    "a file is not listed": at(WEIGHTS, lambda file: None),
    "state is missing": at(STATE, lambda file: without(file, EXP_AVG)),
    "a shard of other elements": at(WEIGHTS, lambda file: with_shard(file, "cube", box(0, 1), ones)),
    "a shard is too large": at(WEIGHTS, lambda file: with_shard(file, "cube", box(1, 2), ones)),
    "a shard is too small": at(STATE, lambda file: with_shard(file, EXP_AVG, box(1, 0), ones)),
    "a shard of another type": at(WEIGHTS, lambda file: with_shard(file, "cube", box(1, 1), ones.double())),
    "a shard of another type of state": at(STATE, lambda file: with_shard(file, EXP_AVG, box(1, 1), ones.double())),
    "a shard of another shape": at(
        WEIGHTS,
        lambda file: with_shard(
            file, "cube", Shard(shape=(3, 5, 3), offsets=(1, 0, 0), sizes=(1, 5, 3)), torch.ones(3, 5, 3)
        ),
    ),
    "a shard of another layer": at(WEIGHTS, lambda file: with_shard(file, "scale", whole_shard(()), torch.ones(()))),
    "state of another layer": at(
        STATE, lambda file: with_shard(file, "state.scale.exp_avg", whole_shard(()), torch.ones(()))
    ),
    "another name in the state": at(STATE, lambda file: with_shard(file, "step", whole_shard(()), torch.ones(()))),
    "a whole tensor twice": at(
        STATE, lambda file: with_shard(file, "state.cube.step", whole_shard(()), torch.ones(()))
    ),
    "notes that differ": at(STATE, lambda file: with_metadata(file, **{NOTES_KEY: '{"state.cube.count": "float"}'})),
    "nothing is said": at(WEIGHTS, lambda file: with_metadata(file, **{SHARDS_KEY: "{}"})),
    "torch is told otherwise": at(
        WEIGHTS, lambda file: with_metadata(file, **{DCP_KEY: '{"cube": {"saved_offsets": [2, 0, 0]}}'})
    ),
    "codes": at(STATE, lambda file: with_metadata(file, **{"llmtailor.codes": "{}"})),
    "no JSON": at(WEIGHTS, lambda file: with_metadata(file, **{SHARDS_KEY: "{"})),
    "a list": at(WEIGHTS, lambda file: with_metadata(file, **{SHARDS_KEY: "[]"})),
    "a name that is not there": at(WEIGHTS, told(cube=rank_of, other=rank_of)),
    "no object": at(WEIGHTS, told(cube=[3, 5, 2])),
    "no offsets": at(WEIGHTS, told(cube={"shape": [3, 5, 2]})),
    "both offsets and start": at(WEIGHTS, told(cube={**rank_of, "start": 10})),
    "negative offset": at(WEIGHTS, told(cube={**rank_of, "offsets": [-1, 0, 0]})),
    "offset past the end": at(WEIGHTS, told(cube={**rank_of, "offsets": [3, 0, 0]})),
    "too few offsets": at(WEIGHTS, told(cube={**rank_of, "offsets": [1, 0]})),
    "fractions": at(WEIGHTS, told(cube={**rank_of, "offsets": [1.0, 0, 0]})),
    "truth as a number": at(WEIGHTS, told(cube={**rank_of, "offsets": [True, 0, 0]})),
    "text": at(WEIGHTS, told(cube={**rank_of, "shape": "3, 5, 2"})),
    "huge shape": at(WEIGHTS, told(cube={"shape": [2**70, 5, 2], "offsets": [1, 0, 0]})),
    "large shape": at(WEIGHTS, told(cube={"shape": [2**61, 5, 2], "offsets": [1, 0, 0]})),
    "huge number of dims": at(WEIGHTS, told(cube={"shape": [1] * 100_000, "offsets": [0] * 100_000})),
    "huge start": at(WEIGHTS, told(cube={"shape": [3, 5, 2], "start": 2**61})),
    "a run of another shape": at(WEIGHTS, told(cube={"shape": [3, 5, 2], "start": 10})),
}


@pytest.fixture(params=MISTAKES.values(), ids=MISTAKES)
def mistaken(request: pytest.FixtureRequest, whole: Checkpoint, tmp_path: Path) -> Checkpoint:
    return cut_checkpoint(whole, tmp_path / "checkpoint-7", boxes(3), change=request.param)


def assert_refused(checkpoint: Checkpoint, error: type[Exception]) -> None:
    """By whoever loads, before anything is changed, and by ``verify``."""
    model, optimizer = train(2)
    before = snapshot_model(model), snapshot_optimizer(model, optimizer)
    with pytest.raises(error) as caught:
        plan_load(checkpoint, read_model(model), [optimizer]).fill()
    text = str(caught.value)
    assert "cube" in text, text
    assert_same(snapshot_model(model), before[0])
    assert_same(snapshot_optimizer(model, optimizer), before[1])
    problems = verify_checkpoint(checkpoint.path).problems
    assert problems
    assert all("cube" in problem.path and problem.layer == "cube" for problem in problems), problems


def test_a_writers_mistake_is_refused_and_found(mistaken: Checkpoint) -> None:
    assert_refused(mistaken, FormatError)


def test_a_mistake_is_refused_by_a_catalog(mistaken: Checkpoint) -> None:
    from llmtailor.formats.tailored import open_tailored

    catalog = open_tailored(mistaken.path)
    with pytest.raises(FormatError):
        (catalog.weights["cube"], catalog.states["cube"])
    assert catalog.weights["scale"].meta.shape == ()


@pytest.mark.parametrize("path", [WEIGHTS, STATE])
def test_a_part_that_is_gone_is_found(whole: Checkpoint, tmp_path: Path, path: str) -> None:
    checkpoint = cut_checkpoint(whole, tmp_path / "checkpoint-7", boxes(3))
    (checkpoint.path / path).unlink()
    assert_refused(checkpoint, NotFoundError)


@pytest.mark.parametrize("path", [WEIGHTS, STATE])
def test_a_part_that_is_cut_off_is_found(whole: Checkpoint, tmp_path: Path, path: str) -> None:
    checkpoint = cut_checkpoint(whole, tmp_path / "checkpoint-7", boxes(3))
    content = (checkpoint.path / path).read_bytes()
    (checkpoint.path / path).write_bytes(content[:-1])
    assert_refused(checkpoint, IntegrityError)


def test_a_flipped_bit_in_any_part_is_found(whole: Checkpoint, tmp_path: Path) -> None:
    checkpoint = cut_checkpoint(whole, tmp_path / "checkpoint-7", boxes(2, 2))
    model, optimizer = train(2)
    records = [record for layer in checkpoint.manifest.layers for record in layer.files]
    assert len(records) > 20
    for record in records:
        path = checkpoint.path / record.path
        for bit in (70, 8 * record.bytes - 9):
            flip_bit(path, bit)
            with pytest.raises((FormatError, IntegrityError)):
                plan_load(checkpoint, read_model(model), [optimizer]).fill()
            (problem,) = verify_checkpoint(checkpoint.path).problems
            assert (problem.path, problem.kind) == (record.path, "digest")
            flip_bit(path, bit)
    plan_load(checkpoint, read_model(model), [optimizer]).fill()
    expected_model, expected = train(1)
    assert_same(snapshot_model(model), snapshot_model(expected_model))
    assert_same(snapshot_optimizer(model, optimizer), snapshot_optimizer(expected_model, expected))


def test_state_is_not_the_optimizers_before_all_its_parts_are_read(whole: Checkpoint, tmp_path: Path) -> None:
    checkpoint = cut_checkpoint(whole, tmp_path / "checkpoint-7", boxes(3))
    flip_bit(checkpoint.path / STATE, 8 * (checkpoint.path / STATE).stat().st_size - 9)
    model = Mixed(2)
    optimizer = make_optimizer(model)
    with pytest.raises(IntegrityError):
        load_optimizers(checkpoint, read_model(model), [optimizer])
    assert optimizer.state[model.cube] == {}


# Cut tensors, as rank after rank of a world that is not there


@pytest.fixture
def ranks() -> Iterator[Callable[[int, int], None]]:
    """Become a rank of a world whose messages come from nowhere; loading sends none."""
    distributed = torch.distributed
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def become(rank: int, size: int) -> None:
        _clear_sharding_prop_cache()  # it has the mesh of the rank before
        if distributed.is_initialized():
            distributed.destroy_process_group()
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    yield become
    if distributed.is_initialized():
        distributed.destroy_process_group()


def cut_model(model: Mixed, mesh_shape: tuple[int, ...]) -> None:
    """Make a rank's shards of the model's parameters, as FSDP2 and tensor parallelism do; buffers stay whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Placement, Replicate
    from torch.distributed.tensor import Shard as Cut
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = init_device_mesh("cpu", mesh_shape)
    for name, parameter in [*model.named_parameters()]:
        placements: list[Placement] = [
            Cut(axis) if axis < parameter.ndim and parameter.numel() else Replicate() for axis in range(mesh.ndim)
        ]
        sizes, _ = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
        made = DTensor.from_local(
            torch.full(sizes, 7, dtype=parameter.dtype),
            mesh,
            placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.contiguous().stride(),
        )
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(made, requires_grad=parameter.requires_grad))


SOME_CUTS = ("rows of 4", "columns of 3", "grid of 3 x 2", "runs of 5")


@pytest.mark.parametrize("saved", [None, *(CUTS[name] for name in SOME_CUTS)], ids=["whole", *SOME_CUTS])
@pytest.mark.parametrize("mesh", [(1,), (2,), (13,), (2, 2)], ids=str)
def test_cut_models_are_loaded_from_any_cut(
    whole: Checkpoint,
    tmp_path: Path,
    tensors: Tensors,
    ranks: Callable[[int, int], None],
    saved: Cut | None,
    mesh: tuple[int, ...],
) -> None:
    from llmtailor.local_parts import local_part

    checkpoint = whole if saved is None else cut_checkpoint(whole, tmp_path / "checkpoint-7", saved)
    size = torch.Size(mesh).numel()
    for rank in {0, 1, size - 1} & {*range(size)}:
        ranks(rank, size)
        model = Mixed(2)
        cut_model(model, mesh)
        optimizer = make_optimizer(model)
        state = read_model(model)
        plan_load(checkpoint, state, [optimizer]).fill()
        for fqn, tensor in state.tensors.items():
            part = local_part(tensor)
            assert_same({fqn: part.tensor}, {fqn: take(tensors[fqn], part.shard)})
        for fqn, parameter in state.parameters():
            for leaf, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    key, part = state_key(fqn, leaf), local_part(value)
                    assert_same({key: part.tensor}, {key: take(tensors[key], part.shard)})
        assert optimizer.state[model.cube]["count"] == 3
        assert optimizer.state[model.cube]["mode"] == "fast"
        assert model.frozen not in optimizer.state


def test_load_model_takes_parts(whole: Checkpoint, tmp_path: Path) -> None:
    model = Mixed(2)
    load_model(cut_checkpoint(whole, tmp_path / "checkpoint-7", columns(3)), read_model(model))
    assert_same(snapshot_model(model), snapshot_model(train(1)[0]))


def test_a_rank_that_holds_nothing_has_the_optimizers_state_of_nothing(
    whole: Checkpoint, tmp_path: Path, ranks: Callable[[int, int], None]
) -> None:
    """SGD's momentum alone: there is no count that every rank reads."""
    model = Mixed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    checkpointer = Checkpointer(tmp_path / "run")
    path = checkpointer.save(7, model, [optimizer], lambda directory: None).result()
    checkpointer.close()
    checkpoint = cut_checkpoint(open_checkpoint(path), tmp_path / "checkpoint-7", boxes(3))
    ranks(12, 13)
    other = Mixed(2)
    cut_model(other, (13,))
    momentum = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    read: list[FileRecord] = []
    plan_load(checkpoint, read_model(other), [momentum]).fill(read.append)
    assert not [file for file in read if "cube" in file.path]
    buffer = momentum.state[other.cube]["momentum_buffer"]
    assert (tuple(buffer.shape), buffer.to_local().numel()) == ((3, 5, 2), 0)


def test_whole_models_read_every_file(whole: Checkpoint, tmp_path: Path) -> None:
    checkpoint = cut_checkpoint(whole, tmp_path / "checkpoint-7", columns(3))
    model, optimizer = train(2)
    read: list[FileRecord] = []
    plan_load(checkpoint, read_model(model), [optimizer]).fill(read.append)
    listed = [file.path for layer in checkpoint.manifest.layers for file in layer.files]
    assert sorted(file.path for file in read) == sorted(listed)
    read.clear()
    plan_load(whole, read_model(model), [optimizer]).fill(read.append)
    listed = [file.path for layer in whole.manifest.layers for file in layer.files]
    assert "model-empty.safetensors" in listed
    assert sorted(file.path for file in read) == sorted(listed)


def test_a_whole_file_that_says_it_holds_shards_is_refused(whole: Checkpoint, tmp_path: Path) -> None:
    """Of a layer whose weights alone are in parts, the state must be whole."""
    checkpoint = cut_checkpoint(whole, tmp_path / "checkpoint-7", boxes(3), kinds=("weights",))
    layer = next(each for each in checkpoint.manifest.layers if each.name == "cube")
    assert layer.optimizer is not None
    (part,) = [file for file in cut_file(checkpoint.path / layer.optimizer.path, runs(1)) if file.tensors]
    content = part.encode()
    overwrite(checkpoint.path / layer.optimizer.path, content)
    record = FileRecord(path=layer.optimizer.path, bytes=len(content), digest=digest_of(content))
    layers = [
        each.model_copy(update={"optimizer": record}) if each is layer else each for each in checkpoint.manifest.layers
    ]
    manifest = checkpoint.manifest.model_copy(update={"layers": tuple(layers)})
    overwrite(checkpoint.path / MANIFEST_NAME, encode_manifest(manifest)[0])
    assert_refused(open_checkpoint(checkpoint.path), FormatError)
