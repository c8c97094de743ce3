from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from formats.deepspeed_files import (
    DIRECTORY,
    NAMES,
    TAG,
    assert_same,
    assert_same_tensors,
    copy_fixture,
    edit,
    model_file,
    optim_file,
)
from formats.simple_writer import load_ref, write_checkpoint
from llmtailor.catalog import Catalog, GroupRef, OptimizerRef, StateRef
from llmtailor.errors import (
    FormatError,
    IncompatibleError,
    IncompleteError,
    InvalidInputError,
    TailorError,
    UnsupportedError,
)
from llmtailor.file_plan import TensorSlice, Zeros
from llmtailor.formats.deepspeed import open_deepspeed, plan_deepspeed
from llmtailor.formats.torch_files import Global, Instance, TorchTensor, metadata_of, open_torch_file
from llmtailor.tensor_refs import FileTensor, InlineTensor, ScaledTensor
from llmtailor.tensors import TensorMeta

OTHER_STAGE = {1: 2, 2: 3, 3: 2}


def write(catalog: Catalog, directory: Path, **options: Any) -> Path:
    return write_checkpoint(plan_deepspeed(catalog, **options), directory)


def at_step(catalog: Catalog, step: float) -> Catalog:
    """The same, as if saved after another number of updates."""
    ref = InlineTensor(meta=TensorMeta(dtype="F32", shape=()), data=struct.pack("<f", step))
    states = {
        fqn: replace(state, tensors={**state.tensors, "step": ref}) if "step" in state.tensors else state
        for fqn, state in catalog.states.items()
    }
    return replace(catalog, states=states)


# The way there and back.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", [None, 1, 5])
def test_written_checkpoint_holds_the_same_for_any_number_of_ranks(
    name: str, ranks: int | None, tmp_path: Path
) -> None:
    catalog = open_deepspeed(DIRECTORY / name)
    assert_same_tensors(open_deepspeed(write(catalog, tmp_path / "out", ranks=ranks)), catalog)


@pytest.mark.parametrize("name", [name for name in NAMES if "elastic" not in name])
def test_written_checkpoint_holds_the_same_at_another_stage(name: str, tmp_path: Path) -> None:
    catalog = open_deepspeed(DIRECTORY / name)
    stage = OTHER_STAGE[catalog.native.stage]  # type: ignore[attr-defined]
    found = open_deepspeed(write(catalog, tmp_path / "out", ranks=3, stage=stage))
    assert found.native.stage == stage  # type: ignore[attr-defined]
    assert_same_tensors(found, catalog)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_through_other_ranks_and_back_is_the_same(name: str, tmp_path: Path) -> None:
    catalog = open_deepspeed(DIRECTORY / name)
    there = open_deepspeed(write(catalog, tmp_path / "there", ranks=7))
    back = write(there, tmp_path / "back", ranks=catalog.native.ranks)  # type: ignore[attr-defined]
    for path in sorted((DIRECTORY / name / TAG).iterdir()):
        found, expected = open_torch_file(back / TAG / path.name), open_torch_file(path)
        assert_same_trees(found, expected, path.name, skipped=skipped_of(name))


def skipped_of(name: str) -> set[str]:
    """What DeepSpeed itself writes wrong, or with memory in it that it never filled."""
    if "round-robin" in name:
        return {"param_slice_mappings"}
    # At stage 3 the padding of partitions is whatever was there.
    return {"fp32_flat_groups", "frozen_param_fragments"} if name == "z3-bf16-frozen-3ranks" else set()


@pytest.mark.parametrize("name", NAMES)
def test_merge_with_itself_is_what_deepspeed_wrote(name: str, tmp_path: Path) -> None:
    out = write(open_deepspeed(DIRECTORY / name), tmp_path / "out")
    for path in sorted((DIRECTORY / name).rglob("*")):
        place = out / path.relative_to(DIRECTORY / name)
        if path.suffix == ".pt" and path.parent.name == TAG:
            assert_same_trees(open_torch_file(place), open_torch_file(path), path.name, skipped=skipped_of(name))
        elif path.suffix == ".safetensors":
            found, expected = load_file(place), load_file(path)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)
        elif path.is_file():
            assert place.read_bytes() == path.read_bytes(), path.name


def assert_same_trees(found: Any, expected: Any, where: str, skipped: set[str]) -> None:
    assert type(found) is type(expected), where
    match expected:
        case dict():
            assert list(found) == list(expected), where
            if isinstance(expected, OrderedDict):
                assert metadata_of(found) == metadata_of(expected), where
            for key in expected:
                if key not in skipped:
                    assert_same_trees(found[key], expected[key], f"{where}/{key}", skipped)
        case list() | tuple():
            assert len(found) == len(expected), where
            for index, (one, other) in enumerate(zip(found, expected, strict=True)):
                assert_same_trees(one, other, f"{where}/{index}", skipped)
        case TorchTensor():
            assert (found.requires_grad, found.is_parameter) == (expected.requires_grad, expected.is_parameter), where
            assert_same(found.ref, expected.ref, where)
        case Instance():
            assert (found.cls, found.arguments, found.is_call) == (expected.cls, expected.arguments, expected.is_call)
            assert found.state == expected.state, where
        case float():
            assert found == expected or math.isnan(expected), where
        case _:
            assert found == expected, where


def test_tied_names_share_a_storage(tmp_path: Path) -> None:
    out = write(open_deepspeed(DIRECTORY / "z2-fp16-tied"), tmp_path / "out")
    module = torch.load(model_file(out), weights_only=False)["module"]
    assert module["lm_head.weight"].data_ptr() == module["model.embed_tokens.weight"].data_ptr()


def test_plan_reads_each_byte_of_a_rank_once() -> None:
    catalog = open_deepspeed(DIRECTORY / "z3-bf16-frozen-3ranks")
    plan = plan_deepspeed(catalog, ranks=2)
    moved = sum(
        part.nbytes
        for file in plan.files
        if "optim" in file.name
        for part in file.parts
        if isinstance(part, TensorSlice)
    )
    steps = 2 * 2 * 4  # of two ranks and two groups
    assert moved == 3 * sum(ref.meta.nbytes for ref in catalog.masters.values()) + steps


def test_padding_is_zeros() -> None:
    plan = plan_deepspeed(open_deepspeed(DIRECTORY / "z2-bf16"), ranks=5)
    assert any(isinstance(part, Zeros) for file in plan.files for part in file.parts)


# What depends on the number of ranks.


def test_ranks_are_told_everywhere(tmp_path: Path) -> None:
    out = write(open_deepspeed(DIRECTORY / "z2-bf16"), tmp_path / "out", ranks=3)
    assert torch.load(model_file(out), weights_only=False)["dp_world_size"] == 3
    zero = torch.load(optim_file(out, 2), weights_only=False)["optimizer_state_dict"]
    assert zero["partition_count"] == [3, 3]
    total = 7232
    assert zero["group_paddings"] == [-total % 6, -80 % 6]
    assert zero["single_partition_of_fp32_groups"][0].numel() == -(-total // 6) * 2 - (-total % 6)
    assert sorted(path.name for path in out.glob("rng_state_*")) == ["rng_state_0.pth", "rng_state_1.pth"]


def test_optimizer_for_fp32_gradients_keeps_its_padding(tmp_path: Path) -> None:
    """DeepSpeed's BF16_Optimizer cuts nothing off, and tells the padding of the last rank alone."""
    out = write(open_deepspeed(DIRECTORY / "z1-bf16-fp32-gradients-3ranks"), tmp_path / "out", ranks=7)
    zeros = [torch.load(optim_file(out, rank), weights_only=False)["optimizer_state_dict"] for rank in range(7)]
    flats = [zero["single_partition_of_fp32_groups"][1] for zero in zeros]
    norms = 5 * 12
    assert {flat.numel() for flat in flats} == {-(-norms // 14) * 2}
    assert [zero["group_paddings"][1] for zero in zeros] == [0, 0, 0, 0, 0, 0, -norms % 14]


def test_random_state_of_dropped_ranks_is_left_out_and_of_new_ones_told(tmp_path: Path) -> None:
    catalog = open_deepspeed(DIRECTORY / "z2-bf16")
    assert any("ranks 2, 3 have no random state" in note for note in plan_deepspeed(catalog, ranks=4).notes)
    one = plan_deepspeed(catalog, ranks=1)
    assert [file.name for file in one.files if file.name.startswith("rng")] == ["rng_state_0.pth"]
    assert not any("random state" in note for note in one.notes)


def test_sub_groups_follow_the_configured_size(tmp_path: Path) -> None:
    catalog = open_deepspeed(DIRECTORY / "z3-fp32-tied-subgroups")
    out = write(catalog, tmp_path / "out", ranks=1)
    sizes = [
        flat.numel()
        for flat in torch.load(optim_file(out, 0), weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"]
    ]
    assert len(sizes) > len(catalog.native.flats)  # type: ignore[attr-defined]
    assert all(size >= 1500 for size in sizes[:-2])


def test_sub_groups_stay_as_they_are_for_the_same_ranks(tmp_path: Path) -> None:
    """Whatever size they were cut by: one that the configuration no longer says, or another version's default."""
    checkpoint = copy_fixture("z3-fp32-tied-subgroups", tmp_path)
    for rank in (0, 1):
        edit(optim_file(checkpoint, rank), lambda tree: tree["ds_config"]["zero_optimization"].pop("sub_group_size"))
    catalog = open_deepspeed(checkpoint)
    found = open_deepspeed(write(catalog, tmp_path / "out"))
    assert found.native.flats == catalog.native.flats  # type: ignore[attr-defined]


def test_alignment_follows_the_parameters(tmp_path: Path) -> None:
    out = write(open_deepspeed(DIRECTORY / "z2-bf16-alignment"), tmp_path / "out", ranks=3)
    zero = torch.load(optim_file(out, 0), weights_only=False)["optimizer_state_dict"]
    real = torch.load(optim_file(DIRECTORY / "z2-bf16-alignment", 0), weights_only=False)["optimizer_state_dict"]
    assert zero["param_alignment_paddings"] == real["param_alignment_paddings"]
    assert any(padding for paddings in real["param_alignment_paddings"] for padding in paddings)


def test_count_of_the_group_alone_is_that_of_its_parameters_and_stays_in_the_group(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z2-bf16-fused-adam", tmp_path)

    def count_in_groups(tree: Any) -> None:
        base = tree["optimizer_state_dict"]["base_optimizer_state"]
        for state in base["state"].values():
            del state["step"]
        for group in base["param_groups"]:
            group["step"] = 3

    for rank in (0, 1):
        edit(optim_file(checkpoint, rank), count_in_groups)
    catalog = open_deepspeed(checkpoint)
    for state in catalog.states.values():
        assert state.notes == {"step": "int"}
        assert load_ref(state.tensors["step"]) == 3
    out = write(catalog, tmp_path / "out")
    base = torch.load(optim_file(out, 1), weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]
    assert [list(state) for state in base["state"].values()] == [["exp_avg", "exp_avg_sq"]]
    assert [group["step"] for group in base["param_groups"]] == [3]


def test_rank_of_another_model_is_refused_when_its_file_is_needed(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z3-bf16", tmp_path)
    edit(model_file(checkpoint, 1), lambda tree: tree["param_shapes"][0].update({"lm_head.weight": (1, 1)}))
    with pytest.raises(FormatError) as caught:
        plan_deepspeed(open_deepspeed(checkpoint))
    assert "different models" in str(caught.value)


def test_round_robin_is_dealt_anew(tmp_path: Path) -> None:
    catalog = open_deepspeed(DIRECTORY / "z2-bf16-round-robin-frozen-3ranks")
    out = write(catalog, tmp_path / "out", ranks=2)
    shapes = torch.load(model_file(out), weights_only=False)["param_shapes"]
    given = catalog.optimizers[0].groups[0].parameters
    assert list(shapes[0]) == [*given[::2], *given[1::2]]


# Common steps.


def merged(old: Catalog, new: Catalog, taken: tuple[str, ...]) -> Catalog:
    return replace(
        new,
        weights={fqn: (old if fqn in taken else new).weights[fqn] for fqn in new.weights},
        masters={fqn: (old if fqn in taken else new).masters[fqn] for fqn in new.masters},
        states={fqn: (old if fqn in taken else new).states[fqn] for fqn in new.states},
    )


TAKEN = ("lm_head.weight", "model.norm.weight")


@pytest.mark.parametrize("name", ["z1-bf16-layer-groups", "z2-bf16", "z3-bf16", "z3-fp32-tied-subgroups"])
def test_moments_saved_at_another_count_are_rescaled_to_that_of_state_from(name: str, tmp_path: Path) -> None:
    new = open_deepspeed(DIRECTORY / name)
    taken = tuple(fqn for fqn in TAKEN if fqn in new.masters)
    plan = plan_deepspeed(merged(at_step(new, 2.0), new, taken))
    assert any(
        f"{len(taken)} parameters saved after 2 updates go on with their group's 3" in note for note in plan.notes
    )
    found = open_deepspeed(write_checkpoint(plan, tmp_path / "out"))
    for fqn, state in new.states.items():
        assert load_ref(found.states[fqn].tensors["step"]) == 3.0
        for leaf, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999)):
            factor = (1 - beta**3) / (1 - beta**2) if fqn in taken else 1.0
            expected = (load_ref(state.tensors[leaf]).double() * factor).float()
            assert torch.equal(load_ref(found.states[fqn].tensors[leaf]), expected), (fqn, leaf)
        assert_same(found.masters[fqn], new.masters[fqn], fqn)


def test_update_that_adam_would_make_is_the_same_after_rescaling(tmp_path: Path) -> None:
    new = open_deepspeed(DIRECTORY / "z2-bf16")
    found = open_deepspeed(write(merged(at_step(new, 1.0), new, TAKEN), tmp_path / "out"))
    old, rescaled = new.states["lm_head.weight"].tensors, found.states["lm_head.weight"].tensors

    def update(tensors: Mapping[str, Any], step: int) -> torch.Tensor:
        mean, square = (load_ref(tensors[leaf]).double() for leaf in ("exp_avg", "exp_avg_sq"))
        return (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)

    assert torch.allclose(update(rescaled, 3), update(old, 1), rtol=1e-6)


def test_same_count_leaves_every_byte_alone() -> None:
    new = open_deepspeed(DIRECTORY / "z2-bf16")
    plan = plan_deepspeed(merged(at_step(new, 3.0), new, TAKEN))
    assert not plan.notes
    slices = [part for file in plan.files for part in file.parts if isinstance(part, TensorSlice)]
    assert not any(isinstance(part.tensor, ScaledTensor) for part in slices)


def test_own_steps_refuses_other_counts_and_takes_equal_ones() -> None:
    new = open_deepspeed(DIRECTORY / "z2-bf16")
    plan_deepspeed(merged(at_step(new, 3.0), new, TAKEN), own_steps=True)
    with pytest.raises(IncompatibleError) as caught:
        plan_deepspeed(merged(at_step(new, 2.0), new, TAKEN), own_steps=True)
    assert caught.value.kind == "common-step"
    assert caught.value.fqn in TAKEN


def test_group_with_its_own_betas_is_rescaled_by_them(tmp_path: Path) -> None:
    new = open_deepspeed(DIRECTORY / "z2-bf16")
    groups = [
        replace(group, options={**group.options, "betas": {"tuple": [0.5, 0.75]}}) for group in new.optimizers[0].groups
    ]
    changed = replace(
        merged(at_step(new, 1.0), new, TAKEN), optimizers=(replace(new.optimizers[0], groups=tuple(groups)),)
    )
    found = open_deepspeed(write(changed, tmp_path / "out")).states["lm_head.weight"].tensors
    expected = load_ref(new.states["lm_head.weight"].tensors["exp_avg"]).double() * (1 - 0.5**3) / (1 - 0.5)
    assert torch.equal(load_ref(found["exp_avg"]), expected.float())


def test_momentum_has_no_count_and_is_not_rescaled(tmp_path: Path) -> None:
    new = open_deepspeed(DIRECTORY / "z2-bf16-sgd")
    plan = plan_deepspeed(new)
    assert not plan.notes


def test_without_a_native_checkpoint_the_largest_count_is_the_common_one(tmp_path: Path) -> None:
    new = open_deepspeed(DIRECTORY / "z2-bf16")
    mixed = replace(merged(at_step(new, 8.0), new, TAKEN), native=None)
    found = open_deepspeed(write(mixed, tmp_path / "out", ranks=2))
    assert {load_ref(state.tensors["step"]).item() for state in found.states.values()} == {8.0}


# From other formats.


def foreign(catalog: Catalog) -> Catalog:
    """As if it were of a framework without masters beside the weights."""
    return replace(catalog, weights={**catalog.weights, **catalog.masters}, masters={}, native=None, files=())


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", ["z1-fp32", "z2-fp16-tied", "z3-bf16-frozen-3ranks", "z2-bf16-muon"])
def test_checkpoint_of_another_format_becomes_one_of_deepspeed(name: str, stage: int, tmp_path: Path) -> None:
    catalog = foreign(open_deepspeed(DIRECTORY / name))
    plan = plan_deepspeed(catalog, ranks=3, stage=stage)
    found = open_deepspeed(write_checkpoint(plan, tmp_path / "out"))
    assert found.optimizers == catalog.optimizers
    assert (found.ties, found.step) == (catalog.ties, 3)
    assert {ref.meta.dtype for ref in found.weights.values()} == {"BF16"}
    for fqn, ref in catalog.weights.items():
        if fqn in found.masters:
            assert_same(found.masters[fqn], ref, fqn)
        assert torch.equal(load_ref(found.weights[fqn]), load_ref(ref).bfloat16())
    for fqn, state in catalog.states.items():
        for leaf, ref in state.tensors.items():
            assert_same(found.states[fqn].tensors[leaf], ref, f"{leaf} {fqn}")
    assert any("fp32 masters" in note for note in plan.notes)
    assert (tmp_path / "out" / "latest").read_text() == "global_step3"


def test_weights_stay_fp32_where_that_is_wanted(tmp_path: Path) -> None:
    catalog = foreign(open_deepspeed(DIRECTORY / "z1-fp32"))
    out = write(catalog, tmp_path / "out", ranks=1, dtype="F32")
    assert optim_file(out, 0).name.startswith("zero_pp_rank_0")
    assert {ref.meta.dtype for ref in open_deepspeed(out).weights.values()} == {"F32"}


def test_files_from_nothing_have_the_keys_of_real_ones(tmp_path: Path) -> None:
    for name, stage in (("z2-bf16", 2), ("z3-bf16", 3)):
        real = DIRECTORY / name
        out = write(replace(open_deepspeed(real), native=None), tmp_path / name, ranks=2, stage=stage)
        for file in (optim_file, model_file):
            ours, theirs = (torch.load(file(root, 0), weights_only=False) for root in (out, real))
            # What is left out keeps the value that the engine is configured with.
            assert theirs.keys() - ours.keys() <= {"global_samples"}
            assert ours.keys() <= theirs.keys()
            if "optimizer_state_dict" in ours:
                missing = theirs["optimizer_state_dict"].keys() - ours["optimizer_state_dict"].keys()
                assert missing <= {
                    "clip_grad",
                    "loss_scaler",
                    "dynamic_loss_scale",
                    "overflow",
                    "param_alignment_paddings",
                }


# What cannot be written.


def one_group(catalog: Catalog) -> GroupRef:
    return catalog.optimizers[0].groups[0]


def plain() -> Catalog:
    return open_deepspeed(DIRECTORY / "z2-bf16")


def with_state(catalog: Catalog, fqn: str, state: StateRef | None) -> Catalog:
    states = {name: each for name, each in catalog.states.items() if name != fqn}
    return replace(catalog, states=states if state is None else {**states, fqn: state})


def with_leaf(catalog: Catalog, leaf: str, meta: TensorMeta) -> Catalog:
    ref = InlineTensor(meta=meta, data=bytes(meta.nbytes))
    states = {fqn: replace(each, tensors={**each.tensors, leaf: ref}) for fqn, each in catalog.states.items()}
    return replace(catalog, states=states, native=None)


@pytest.mark.parametrize(
    ("catalog", "options", "error", "kind"),
    [
        (lambda: plain(), {"ranks": 0}, InvalidInputError, "ranks"),
        (lambda: replace(plain(), native=None), {}, InvalidInputError, "ranks"),
        (lambda: plain(), {"stage": 4}, InvalidInputError, "stage"),
        (lambda: replace(plain(), native=None), {"ranks": 2, "dtype": "F16"}, UnsupportedError, "deepspeed-dtype"),
        (lambda: replace(plain(), optimizers=()), {}, IncompleteError, "optimizers"),
        (lambda: replace(plain(), optimizers=plain().optimizers * 2), {}, UnsupportedError, "optimizers"),
        (lambda: with_state(plain(), "lm_head.weight", None), {}, IncompleteError, "missing-state"),
        (
            lambda: replace(plain(), weights={k: v for k, v in plain().weights.items() if k != "lm_head.weight"}),
            {},
            IncompleteError,
            "missing-weights",
        ),
        (
            lambda: replace(
                plain(),
                optimizers=(OptimizerRef(name=None, groups=(one_group(plain()), GroupRef(parameters=(), options={}))),),
            ),
            {},
            IncompatibleError,
            "empty-group",
        ),
        (
            lambda: with_leaf(plain(), "factors", TensorMeta(dtype="F32", shape=(3,))),
            {"ranks": 2},
            UnsupportedError,
            "flat-state",
        ),
        (
            lambda: with_leaf(plain(), "quant/codes", TensorMeta(dtype="F32", shape=())),
            {"ranks": 2},
            UnsupportedError,
            "flat-state",
        ),
        (lambda: open_deepspeed(DIRECTORY / "z2-bf16-elastic"), {"stage": 3}, UnsupportedError, "no-options"),
    ],
)
def test_what_has_no_place_is_refused_before_anything_is_planned(
    catalog: Any, options: dict[str, Any], error: type[TailorError], kind: str
) -> None:
    with pytest.raises(error) as caught:
        plan_deepspeed(catalog(), **options)
    assert type(caught.value) is error
    assert caught.value.kind == kind


def test_code_and_foreign_classes_do_not_get_into_new_files(tmp_path: Path) -> None:
    checkpoint = copy_fixture("z2-bf16", tmp_path)
    (checkpoint / "zero_to_fp32.py").write_text("raise SystemExit")
    plan = plan_deepspeed(open_deepspeed(checkpoint))
    assert not [file.name for file in plan.files if file.name.endswith(".py")]
    planned = open_torch_file(optim_file(checkpoint, 0))
    assert isinstance(planned["optimizer_state_dict"]["loss_scaler"], Instance)

    def plant(tree: Any) -> None:
        tree["client"] = Instance(Global("torch.hub", "load"), ("x",), is_call=True)

    with pytest.raises(UnsupportedError):
        edit(model_file(checkpoint), plant)
    tree = open_torch_file(model_file(checkpoint))
    plant(tree)
    catalog = open_deepspeed(checkpoint)
    hostile = replace(catalog, native=replace(catalog.native, model=tree))  # type: ignore[type-var]
    with pytest.raises(UnsupportedError):
        plan_deepspeed(hostile)


def test_sources_are_refs_into_files_and_nothing_is_copied_into_memory() -> None:
    plan = plan_deepspeed(open_deepspeed(DIRECTORY / "z2-bf16"))
    known = sum(len(part) for file in plan.files for part in file.parts if isinstance(part, bytes))
    refs = [part.tensor for file in plan.files for part in file.parts if isinstance(part, TensorSlice)]
    assert all(isinstance(ref, FileTensor) for ref in refs)
    assert known < 60_000
