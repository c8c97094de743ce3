from __future__ import annotations

import io
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from formats.dcp_files import (
    APP,
    LOOP,
    OLD,
    TIED,
    TIED_FULL,
    TITAN,
    TRAINER,
    WEIGHTS,
    differences,
    load,
    save,
)
from formats.simple_writer import load_ref, write_checkpoint
from llmtailor.catalog import Catalog, GroupRef, OptimizerRef, StateRef
from llmtailor.errors import FormatError, InvalidInputError, UnsupportedError
from llmtailor.file_plan import FileRange
from llmtailor.formats.dcp import open_dcp, plan_dcp
from llmtailor.tensor_refs import CastTensor, FileTensor, InlineTensor, TensorRef
from llmtailor.tensors import TensorMeta

SHARDED = {"loop": LOOP, "tied": TIED, "titan": TITAN, "app": APP, "old": OLD, "weights": WEIGHTS}
DIRECTORIES = ("pytorch_model_fsdp_0", "optimizer_0")


def plain(catalog: Catalog) -> Catalog:
    """The same, as if it were of another format: nothing of DCP in its references."""

    def of(ref: TensorRef) -> TensorRef:
        return FileTensor(meta=ref.meta, extents=ref.extents) if isinstance(ref, FileTensor) else ref

    return replace(
        catalog,
        format="hf",
        weights={name: of(ref) for name, ref in catalog.weights.items()},
        states={
            name: replace(state, tensors={leaf: of(ref) for leaf, ref in state.tensors.items()})
            for name, state in catalog.states.items()
        },
    )


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("ranks", [None, 1, 3])
def test_a_checkpoint_written_again_loads_as_the_same(name: str, ranks: int | None, tmp_path: Path) -> None:
    output = write_checkpoint(plan_dcp(open_dcp(SHARDED[name]), ranks=ranks), tmp_path / "output")
    assert differences(load(output), load(SHARDED[name])) == []


@pytest.mark.parametrize("name", SHARDED)
def test_tensors_of_other_formats_load_as_the_same(name: str, tmp_path: Path) -> None:
    output = write_checkpoint(plan_dcp(plain(open_dcp(SHARDED[name])), ranks=2), tmp_path / "output")
    assert differences(load(output), load(SHARDED[name])) == []


def test_the_trainers_layout_is_kept(tmp_path: Path) -> None:
    output = write_checkpoint(plan_dcp(open_dcp(TRAINER)), tmp_path / "output")
    for directory in DIRECTORIES:
        assert differences(load(output / directory), load(TRAINER / directory)) == []
    for name in ("rng_state_0.pth", "rng_state_1.pth", "scheduler.pt", "trainer_state.json"):
        assert (output / name).read_bytes() == (TRAINER / name).read_bytes()


def test_the_trainers_full_state_dict_is_kept(tmp_path: Path) -> None:
    output = write_checkpoint(plan_dcp(open_dcp(TIED_FULL)), tmp_path / "output")
    for name in ("pytorch_model_fsdp.bin", "optimizer.bin"):
        both = (torch.load(directory / name, weights_only=True) for directory in (output, TIED_FULL))
        assert differences(*both) == []
    assert not (output / "model.safetensors").exists()


def test_another_format_with_a_trainers_state_gets_the_trainers_layout(tmp_path: Path) -> None:
    catalog = replace(open_dcp(TIED_FULL), format="hf", native=None)
    output = write_checkpoint(plan_dcp(catalog), tmp_path / "output")
    model, optimizer = (load(output / directory) for directory in DIRECTORIES)
    assert differences(model["model"], torch.load(TIED_FULL / "pytorch_model_fsdp.bin", weights_only=True)) == []
    assert differences(optimizer["optimizer"], torch.load(TIED_FULL / "optimizer.bin", weights_only=True)) == []


def test_another_format_without_one_gets_one_directory(tmp_path: Path) -> None:
    catalog = replace(plain(open_dcp(TITAN)), native=None)
    state = load(write_checkpoint(plan_dcp(catalog), tmp_path / "output"))
    assert {*state} == {"model", "optim"}
    assert differences(state["model"], {name: load_ref(ref) for name, ref in catalog.weights.items()}) == []
    assert [group["params"] for group in state["optim"]["param_groups"]] == [[*catalog.states]]


def test_shards_are_copied_blob_by_blob() -> None:
    """No tensor of an unchanged source is looked into, and its checksums stay those of the one who computed them."""
    plan = plan_dcp(open_dcp(WEIGHTS))
    shards = [file for file in plan.files if file.name.endswith(".distcp")]
    assert [file.name for file in shards] == ["__0_0.distcp", "__1_0.distcp"]
    assert all(isinstance(part, FileRange) for file in shards for part in file.parts)
    assert not any(file.crc_patches for file in shards)


@pytest.mark.parametrize("is_plain", [False, True], ids=["copied", "written"])
def test_every_blob_is_a_torch_file_with_good_checksums(is_plain: bool, tmp_path: Path) -> None:
    catalog = open_dcp(TITAN)
    output = write_checkpoint(plan_dcp(plain(catalog) if is_plain else catalog), tmp_path / "output")
    places = metadata_of(output).storage_data.values()
    assert places
    for place in places:
        data = (output / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
        assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
        torch.load(io.BytesIO(data), weights_only=True)


def metadata_of(directory: Path) -> Any:
    with (directory / ".metadata").open("rb") as file:
        return pickle.load(file)


def test_metadata_is_what_torch_makes_it(tmp_path: Path) -> None:
    theirs = metadata_of(LOOP)
    ours = metadata_of(write_checkpoint(plan_dcp(open_dcp(LOOP)), tmp_path / "output"))
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    assert ours.version == theirs.version
    places = [(place.relative_path, place.offset, place.length) for place in ours.storage_data.values()]
    for name in ("__0_0.distcp", "__1_0.distcp"):
        own = sorted(place for place in places if place[0] == name)
        assert [start for _, start, _ in own] == [0, *(start + length for _, start, length in own[:-1])]
        assert sum(length for _, _, length in own) == (tmp_path / "output" / name).stat().st_size


def test_each_shard_goes_to_the_file_of_its_rank(tmp_path: Path) -> None:
    metadata = metadata_of(write_checkpoint(plan_dcp(open_dcp(TIED)), tmp_path / "output"))
    places = {
        (index.index, place.relative_path)
        for index, place in metadata.storage_data.items()
        if index.offset and len(metadata.state_dict_metadata[index.fqn].chunks) > 1
    }
    assert places == {(rank, f"__{rank}_0.distcp") for rank in range(3)}


def test_new_tensors_are_spread_evenly() -> None:
    plan = plan_dcp(plain(open_dcp(LOOP)), ranks=3)
    sizes = [file.nbytes for file in plan.files if file.name.endswith(".distcp")]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) < 8000  # one tensor


def test_masters_become_the_weights_and_that_is_said(tmp_path: Path) -> None:
    catalog = open_dcp(LOOP)
    name = "model.norm.weight"
    master = catalog.weights[name]
    narrow = CastTensor(meta=TensorMeta(dtype="BF16", shape=master.meta.shape), source=master)
    catalog = replace(catalog, weights={**catalog.weights, name: narrow}, masters={name: master})
    plan = plan_dcp(catalog)
    assert any("fp32 masters" in note for note in plan.notes)
    state = load(write_checkpoint(plan, tmp_path / "output"))
    assert state["model"][name].equal(load_ref(master))
    assert state["model"][name].dtype == torch.float32


def test_computed_tensors_are_written(tmp_path: Path) -> None:
    catalog = open_dcp(LOOP)
    name = "model.norm.weight"
    narrow = CastTensor(meta=replace(catalog.weights[name].meta, dtype="BF16"), source=catalog.weights[name])
    output = write_checkpoint(plan_dcp(replace(catalog, weights={**catalog.weights, name: narrow})), tmp_path / "out")
    assert load(output)["model"][name].equal(load(LOOP)["model"][name].bfloat16())


def test_tied_weights_are_written_under_each_name(tmp_path: Path) -> None:
    """FSDP asks for both names, and what is loaded last wins: they must be the same."""
    catalog, other = open_dcp(TIED), open_dcp(LOOP)
    name = "model.embed_tokens.weight"
    merged = replace(catalog, weights={**catalog.weights, name: other.weights[name]})
    state = load(write_checkpoint(plan_dcp(merged), tmp_path / "output"))
    expected = load(LOOP)["model"][name]
    assert state["model"][name].equal(expected)
    assert state["model"]["lm_head.weight"].equal(expected)


def test_scheduler_and_counters_come_with_the_layout(tmp_path: Path) -> None:
    catalog = open_dcp(TITAN)
    state = load(write_checkpoint(plan_dcp(plain(catalog)), tmp_path / "output"))
    assert state["train_state"]["step"] == 3
    assert state["lr_scheduler"]["last_epoch"] == 0


def test_weights_alone_leave_the_rest_out(tmp_path: Path) -> None:
    catalog = replace(open_dcp(TITAN), optimizers=(), states={})
    state = load(write_checkpoint(plan_dcp(catalog), tmp_path / "output"))
    assert state.keys() == catalog.weights.keys()


def test_names_of_compiled_models_are_written_as_they_were(tmp_path: Path) -> None:
    weights = {"_orig_mod.weight": torch.ones(2, 2)}
    state = {"_orig_mod.weight": {"exp_avg": torch.zeros(2, 2)}}
    optimizer = {"state": state, "param_groups": [{"params": ["_orig_mod.weight"], "lr": 0.1}]}
    source = save(tmp_path / "compiled", {"model": weights, "optim": optimizer})
    output = write_checkpoint(plan_dcp(open_dcp(source)), tmp_path / "output")
    assert differences(load(output), load(source)) == []


@pytest.mark.parametrize("is_flat", [False, True])
def test_state_of_any_shape_goes_through_another_format(is_flat: bool, tmp_path: Path) -> None:
    number = InlineTensor(meta=TensorMeta(dtype="I64", shape=()), data=(7).to_bytes(8, "little"))
    rows = InlineTensor(meta=TensorMeta(dtype="U8", shape=(3,)), data=b"abc")
    empty = InlineTensor(meta=TensorMeta(dtype="F32", shape=(0, 4)), data=b"")
    state = StateRef(tensors={"step": number, "quant/codes": rows, "empty": empty}, notes={"step": "int"})
    group = GroupRef(parameters=("w",), options={"lr": {"tensor": 0.5, "dtype": "F32"}, "betas": {"tuple": [0.9, 1]}})
    catalog = Catalog(
        path=tmp_path,
        format="dcp",
        step=7,
        weights={"w": rows},
        states={"w": state},
        optimizers=(OptimizerRef(name=None, groups=(group,)),),
        native=open_dcp(TITAN).native if is_flat else None,
    )
    output = write_checkpoint(plan_dcp(catalog), tmp_path / "output")
    again = open_dcp(output)
    assert again.optimizers == catalog.optimizers
    assert again.states["w"].notes.items() >= {"step": "int"}.items()
    found = {leaf: load_ref(ref).tolist() for leaf, ref in again.states["w"].tensors.items()}
    assert found == {"step": 7, "quant/codes": [97, 98, 99], "empty": []}
    assert load_ref(again.states["w"].tensors["empty"]).shape == (0, 4)


def test_parameters_without_state_are_named_in_a_note() -> None:
    catalog = open_dcp(LOOP)
    states = {name: state for name, state in catalog.states.items() if name != "model.norm.weight"}
    (note,) = plan_dcp(replace(catalog, states=states)).notes
    assert "model.norm.weight" in note


def test_planner_refuses_a_blob_that_is_something_else(tmp_path: Path) -> None:
    source = save(tmp_path / "source", {"model": {"a": torch.ones(4), "b": torch.zeros(4, dtype=torch.int32)}})
    metadata = metadata_of(source)
    one, other = metadata.storage_data.values()
    one.offset, other.offset = other.offset, one.offset
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(FormatError) as caught:
        plan_dcp(open_dcp(source))
    assert caught.value.kind == "dcp-blob"


def test_planner_refuses_several_optimizers() -> None:
    catalog = open_dcp(LOOP)
    with pytest.raises(UnsupportedError):
        plan_dcp(replace(catalog, optimizers=catalog.optimizers * 2))


@pytest.mark.parametrize("ranks", [0, -1, 10**9])
def test_planner_refuses_a_number_of_ranks_that_is_none(ranks: int) -> None:
    with pytest.raises(InvalidInputError):
        plan_dcp(open_dcp(WEIGHTS), ranks=ranks)
