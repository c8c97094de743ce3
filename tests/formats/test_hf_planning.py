"""Catalogs of any format as Hugging Face directories, read back by the stock libraries."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from formats.simple_writer import write_checkpoint
from llmtailor.catalog import Catalog, GroupRef, OptimizerRef, SmallFile, StateRef
from llmtailor.errors import IncompatibleError, IncompleteError, InvalidInputError, UnsupportedError
from llmtailor.file_plan import CheckpointPlan
from llmtailor.formats.hf import open_hf, plan_hf
from llmtailor.tensor_refs import CastTensor, InlineTensor
from llmtailor.tensors import TensorMeta
from merge import hf_stock
from tiny_models import assert_same

DATA = Path(__file__).parent.parent / "compat" / "data" / "transformers-5.23.0"
LLAMA = DATA / "llama" / "checkpoint-4"


@pytest.fixture
def llama() -> Catalog:
    return open_hf(LLAMA)


def sizes(plan: CheckpointPlan) -> dict[str, int]:
    return {file.name: file.nbytes for file in plan.files}


def options_of(catalog: Catalog) -> dict[str, object]:
    return dict(catalog.optimizers[0].groups[0].options)


def regrouped(catalog: Catalog, groups: Sequence[Sequence[str]], **changes: Any) -> Catalog:
    """The same checkpoint as another tool would keep it: other groups, all with the options of the first."""
    options = options_of(catalog) | changes
    refs = tuple(GroupRef(parameters=tuple(names), options=options) for names in groups)
    return replace(catalog, format="deepspeed", optimizers=(OptimizerRef(name=None, groups=refs),))


def without(catalog: Catalog, *names: str) -> Catalog:
    return replace(catalog, files=tuple(file for file in catalog.files if file.name not in names))


def trained(catalog: Catalog) -> list[str]:
    return [name for group in catalog.optimizers[0].groups for name in group.parameters]


def by_layer(catalog: Catalog) -> list[list[str]]:
    """The 2L + 3 groups: weights with and without decay of each layer."""
    return [[name] for name in sorted(trained(catalog))]


def test_small_files_are_the_sources_bytes(llama: Catalog, tmp_path: Path) -> None:
    written = write_checkpoint(plan_hf(llama), tmp_path / "out")

    for name in ("config.json", "generation_config.json", "rng_state.pth", "scheduler.pt", "trainer_state.json"):
        assert (written / name).read_bytes() == (LLAMA / name).read_bytes()


def test_weights_are_cut_into_shards_as_stock_readers_expect(llama: Catalog, tmp_path: Path) -> None:
    written = write_checkpoint(plan_hf(llama, shard_nbytes=10_000), tmp_path / "out")

    index = json.loads((written / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"] == {"total_parameters": 7920, "total_size": 31680}
    assert all(data_nbytes(written / file) <= 10_000 for file in files)
    assert_same(hf_stock.read_weights(written), hf_stock.read_weights(LLAMA))
    model = transformers.AutoModelForCausalLM.from_pretrained(written)
    assert_same(dict(model.state_dict()), hf_stock.read_weights(LLAMA))
    assert open_hf(written).weights.keys() == llama.weights.keys()


def data_nbytes(path: Path) -> int:
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    return path.stat().st_size - 8 - int(header)


def test_tensor_larger_than_a_shard_has_one_of_its_own(llama: Catalog) -> None:
    names = [name for name in sizes(plan_hf(llama, shard_nbytes=1)) if name.startswith("model-")]

    assert len(names) == len(llama.weights)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_shards_of_no_size_are_refused(llama: Catalog, nbytes: int) -> None:
    with pytest.raises(InvalidInputError):
        plan_hf(llama, shard_nbytes=nbytes)


def test_tied_head_is_written_once(tmp_path: Path) -> None:
    source = DATA / "qwen2-tied" / "checkpoint-2"

    written = write_checkpoint(plan_hf(open_hf(source)), tmp_path / "out")

    assert "lm_head.weight" not in hf_stock.read_weights(written)
    model = transformers.AutoModelForCausalLM.from_pretrained(written)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_alone_leave_out_what_only_training_reads(llama: Catalog, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    llama = replace(llama, files=(*llama.files, SmallFile(name="tokenizer.json", path=tokenizer, nbytes=2)))

    assert sorted(sizes(plan_hf(llama, weights_only=True))) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert "tokenizer.json" not in sizes(plan_hf(llama, copy_tokenizer=False))
    assert "config.json" in sizes(plan_hf(llama, copy_tokenizer=False))


def test_files_of_other_formats_are_left_behind(llama: Catalog) -> None:
    more = [SmallFile(name=name, path=LLAMA / "config.json", nbytes=9) for name in ("latest", "zero.py", "a/b.json")]

    assert sizes(plan_hf(replace(llama, files=(*llama.files, *more)))) == sizes(plan_hf(llama))


@pytest.mark.parametrize("spelling", ["BF16", "bfloat16"])
def test_element_type_of_weights_and_configuration_is_changed(llama: Catalog, spelling: str, tmp_path: Path) -> None:
    written = write_checkpoint(plan_hf(llama, dtype=spelling), tmp_path / "out")

    expected = {name: tensor.bfloat16() for name, tensor in hf_stock.read_weights(LLAMA).items()}
    assert_same(hf_stock.read_weights(written), expected)
    assert json.loads((written / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(hf_stock.read_states(written)["lm_head.weight"], hf_stock.read_states(LLAMA)["lm_head.weight"])


def test_buffers_and_tensors_that_are_no_floating_point_keep_their_type(llama: Catalog, tmp_path: Path) -> None:
    count = InlineTensor(meta=TensorMeta(dtype="I64", shape=()), data=bytes(8))
    scale = InlineTensor(meta=TensorMeta(dtype="F32", shape=(2,)), data=bytes(8))
    weights = {**llama.weights, "count": count, "scale": scale}
    llama = replace(llama, weights=weights, buffers=frozenset({"scale"}))

    written = write_checkpoint(plan_hf(llama, dtype="BF16", weights_only=True), tmp_path / "out")

    found = hf_stock.read_weights(written)
    assert (found["count"].dtype, found["scale"].dtype) == (torch.int64, torch.float32)
    assert found["lm_head.weight"].dtype == torch.bfloat16


def half_precision(catalog: Catalog) -> Catalog:
    """As DeepSpeed keeps it: weights in bf16, and the fp32 weights that the optimizer updates beside them."""
    rounded = {
        name: CastTensor(meta=TensorMeta(dtype="BF16", shape=tensor.meta.shape), source=tensor)
        for name, tensor in catalog.weights.items()
    }
    return replace(catalog, weights=rounded, masters=catalog.weights, format="deepspeed")


def test_master_weights_are_written_for_training(llama: Catalog, tmp_path: Path) -> None:
    plan = plan_hf(half_precision(llama))

    written = write_checkpoint(plan, tmp_path / "out")

    assert_same(hf_stock.read_weights(written), hf_stock.read_weights(LLAMA))
    assert json.loads((written / "config.json").read_text())["dtype"] == "float32"
    assert any("fp32 masters" in note for note in plan.notes)


def test_weights_alone_are_those_of_the_model_not_the_masters(llama: Catalog, tmp_path: Path) -> None:
    written = write_checkpoint(plan_hf(half_precision(llama), weights_only=True), tmp_path / "out")

    assert {tensor.dtype for tensor in hf_stock.read_weights(written).values()} == {torch.bfloat16}


def test_groups_by_layer_become_the_trainers_two(llama: Catalog, tmp_path: Path) -> None:
    decayed = set(llama.optimizers[0].groups[0].parameters)
    groups = tuple(
        GroupRef(
            parameters=tuple(names), options=options_of(llama) | {"weight_decay": 0.1 if names[0] in decayed else 0.0}
        )
        for names in by_layer(llama)
    )
    catalog = replace(llama, format="tailored", optimizers=(OptimizerRef(name=None, groups=groups),))
    catalog = with_scheduler(catalog, tmp_path, [0.01] * len(groups))

    plan = plan_hf(catalog)
    written = write_checkpoint(plan, tmp_path / "out")

    assert_same(hf_stock.everything(written), hf_stock.everything(LLAMA))
    found, expected = hf_stock.read_optimizer(written), hf_stock.read_optimizer(LLAMA)
    assert found["param_groups"] == expected["param_groups"]
    scheduler = torch.load(written / "scheduler.pt", weights_only=True)
    assert (scheduler["base_lrs"], scheduler["lr_lambdas"], scheduler["last_epoch"]) == ([0.01] * 2, [None] * 2, 4)
    assert any("parameter groups became the Trainer's two" in note for note in plan.notes)


def with_scheduler(catalog: Catalog, directory: Path, rates: list[float]) -> Catalog:
    path = directory / "scheduler.pt"
    torch.save({"base_lrs": rates, "last_epoch": 4, "_last_lr": rates, "lr_lambdas": [None] * len(rates)}, path)
    file = SmallFile(name="scheduler.pt", path=path, nbytes=path.stat().st_size)
    catalog = without(catalog, "scheduler.pt")
    return replace(catalog, files=(*catalog.files, file))


def test_one_group_of_everything_becomes_two_with_the_same_options(llama: Catalog, tmp_path: Path) -> None:
    catalog = with_scheduler(regrouped(llama, [sorted(trained(llama))], weight_decay=0.3), tmp_path, [0.01])

    written = write_checkpoint(plan_hf(catalog), tmp_path / "out")

    groups = hf_stock.read_optimizer(written)["param_groups"]
    assert [len(group["params"]) for group in groups] == [23, 7]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.3]  # as the source trained: no decay was spared
    assert_same(hf_stock.everything(written), hf_stock.everything(LLAMA))


def test_groups_that_are_the_trainers_already_are_kept(llama: Catalog, tmp_path: Path) -> None:
    plan = plan_hf(replace(llama, format="deepspeed"))

    written = write_checkpoint(plan, tmp_path / "out")

    assert hf_stock.read_optimizer(written)["param_groups"] == hf_stock.read_optimizer(LLAMA)["param_groups"]
    assert plan.notes == ()


def test_groups_of_different_options_are_refused(llama: Catalog) -> None:
    names = trained(llama)
    first = regrouped(llama, [names[:5]]).optimizers[0].groups
    second = regrouped(llama, [names[5:]], lr=0.5).optimizers[0].groups
    catalog = replace(llama, format="dcp", optimizers=(OptimizerRef(name=None, groups=(*first, *second)),))

    with pytest.raises(IncompatibleError) as caught:
        plan_hf(catalog)

    assert caught.value.kind == "optimizer-groups"
    assert "lr" in str(caught.value.expected)
    assert "optimizer.pt" not in sizes(plan_hf(catalog, weights_only=True))


def test_schedules_of_different_rates_are_refused(llama: Catalog, tmp_path: Path) -> None:
    names = trained(llama)
    catalog = with_scheduler(regrouped(llama, [names[:5], names[5:]]), tmp_path, [0.01, 0.02])

    with pytest.raises(IncompatibleError, match="base_lrs"):
        plan_hf(catalog)


def test_group_of_a_parameter_the_model_has_not_is_refused(llama: Catalog) -> None:
    with pytest.raises(IncompatibleError) as caught:
        plan_hf(regrouped(llama, [[*trained(llama), "model.layers.9.extra.weight"]]))

    assert caught.value.fqn == "model.layers.9.extra.weight"


def test_several_optimizers_are_refused(llama: Catalog) -> None:
    with pytest.raises(IncompatibleError, match="one optimizer"):
        plan_hf(replace(llama, optimizers=llama.optimizers * 2))


def test_steps_of_deepspeeds_adam_become_tensors(llama: Catalog, tmp_path: Path) -> None:
    as_int = InlineTensor(meta=TensorMeta(dtype="I64", shape=()), data=(7).to_bytes(8, "little"))
    states = {
        name: StateRef(tensors={**state.tensors, "step": as_int}, notes={"step": "int"})
        for name, state in llama.states.items()
    }
    catalog = regrouped(replace(llama, states=states), [trained(llama)], bias_correction=True, step=7)

    plan = plan_hf(without(catalog, "scheduler.pt"))
    written = write_checkpoint(plan, tmp_path / "out")

    step = hf_stock.read_states(written)["lm_head.weight"]["step"]
    assert torch.equal(step, torch.tensor(7.0))
    assert step.dtype == torch.float32
    assert not {"bias_correction", "step"} & {*hf_stock.read_optimizer(written)["param_groups"][0]}
    assert any("DeepSpeed's Adam" in note for note in plan.notes)


def test_step_that_is_a_python_int_stays_one_in_other_formats(llama: Catalog, tmp_path: Path) -> None:
    as_int = InlineTensor(meta=TensorMeta(dtype="I64", shape=()), data=(7).to_bytes(8, "little"))
    states = {
        name: StateRef(tensors={**state.tensors, "step": as_int}, notes={"step": "int"})
        for name, state in llama.states.items()
    }

    written = write_checkpoint(plan_hf(replace(llama, states=states)), tmp_path / "out")

    assert type(hf_stock.read_states(written)["lm_head.weight"]["step"]) is int


def test_adam_that_does_not_correct_the_bias_is_refused(llama: Catalog) -> None:
    with pytest.raises(IncompatibleError, match="bias_correction"):
        plan_hf(regrouped(llama, [trained(llama)], bias_correction=False))


def test_scheduler_is_made_where_the_source_keeps_it_elsewhere(llama: Catalog, tmp_path: Path) -> None:
    plan = plan_hf(without(replace(llama, format="deepspeed"), "scheduler.pt"))

    written = write_checkpoint(plan, tmp_path / "out")

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": [each], "lr": 0.5} for each in model.parameters()])
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 2, 10)
    scheduler.load_state_dict(torch.load(written / "scheduler.pt", weights_only=True))
    straight = transformers.get_linear_schedule_with_warmup(optimizer, 2, 10)
    for _ in range(4):
        optimizer.step()
        straight.step()
    counts = ("last_epoch", "_step_count", "_is_initial", "_get_lr_called_within_step", "lr_lambdas")
    assert {key: scheduler.state_dict()[key] for key in counts} == {key: straight.state_dict()[key] for key in counts}
    for _ in range(3):
        scheduler.step()
        straight.step()
        assert scheduler.get_last_lr() == straight.get_last_lr()
    assert any("a new one stands" in note for note in plan.notes)


def test_missing_scheduler_and_trainer_state_of_a_trainer_are_said(llama: Catalog) -> None:
    notes = plan_hf(without(llama, "scheduler.pt", "trainer_state.json")).notes

    assert len(notes) == 2
    assert "no scheduler.pt" in notes[0]
    assert "no trainer_state.json" in notes[1]


def test_groups_of_our_own_stay_where_nobody_knows_the_trainers(llama: Catalog, tmp_path: Path) -> None:
    catalog = replace(regrouped(without(llama, "config.json"), by_layer(llama)), format="tailored")

    plan = plan_hf(catalog)

    assert any("groups stay as they are" in note for note in plan.notes)
    written = write_checkpoint(plan, tmp_path / "out")
    assert len(hf_stock.read_optimizer(written)["param_groups"]) == 30


@pytest.mark.parametrize("tool", ["deepspeed", "dcp"])
def test_positions_nobody_knows_are_refused(llama: Catalog, tool: str) -> None:
    catalog = replace(without(llama, "config.json"), format=tool)

    with pytest.raises(IncompatibleError) as caught:
        plan_hf(catalog)

    assert caught.value.kind == "unknown-order"
    assert "config.json" in str(caught.value.hint)
    assert "model.safetensors" in sizes(plan_hf(catalog, weights_only=True))


def test_random_states_of_several_processes_are_said(llama: Catalog) -> None:
    ranks = [SmallFile(name=f"rng_state_{rank}.pth", path=LLAMA / "rng_state.pth", nbytes=14455) for rank in (0, 1)]

    notes = plan_hf(replace(llama, format="deepspeed", files=(*llama.files, *ranks))).notes

    assert any("2 processes" in note for note in notes)


def stacked(catalog: Catalog, sources: Sequence[int]) -> Catalog:
    """A model whose blocks are those of the source, in another number."""

    def moved(values: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: value for name, value in values.items() if ".layers." not in name}
        for target, source in enumerate(sources):
            prefix = f"model.layers.{source}."
            found |= {
                f"model.layers.{target}.{name.removeprefix(prefix)}": value
                for name, value in values.items()
                if name.startswith(prefix)
            }
        return found

    return replace(catalog, weights=moved(catalog.weights), states={}, optimizers=())


def test_configuration_says_how_many_blocks_the_new_model_has(llama: Catalog, tmp_path: Path) -> None:
    written = write_checkpoint(plan_hf(stacked(llama, [0, 1, 1, 2, 2]), num_blocks=5), tmp_path / "out")

    model, report = transformers.AutoModelForCausalLM.from_pretrained(written, output_loading_info=True)
    assert len(model.model.layers) == 5
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    source = hf_stock.read_weights(LLAMA)
    assert torch.equal(model.model.layers[4].mlp.up_proj.weight, source["model.layers.2.mlp.up_proj.weight"])


def test_blocks_that_the_configuration_does_not_count_stay_uncounted(llama: Catalog, tmp_path: Path) -> None:
    # As hub models hold a block that predicts further tokens: numbered on after the others, with tensors of its own.
    more = {
        name.replace(".layers.2.", ".layers.3."): tensor
        for name, tensor in llama.weights.items()
        if ".layers.2." in name
    }
    more["model.layers.3.enorm.weight"] = llama.weights["model.norm.weight"]

    plan = plan_hf(replace(llama, weights={**llama.weights, **more}), weights_only=True)

    written = write_checkpoint(plan, tmp_path / "out")
    assert (written / "config.json").read_bytes() == (LLAMA / "config.json").read_bytes()
    assert hf_stock.read_weights(written).keys() == {*llama.weights, *more}
    assert plan.notes == ("config.json says 3 blocks, and 4 are here: both stay as they are",)


def test_depth_that_the_configuration_says_nowhere_is_left_to_the_reader(llama: Catalog, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"llm_config": {"num_hidden_layers": 3}}')
    files = (SmallFile(name="config.json", path=path, nbytes=path.stat().st_size),)

    plan = plan_hf(replace(stacked(llama, [0, 1]), files=files), num_blocks=2)

    assert (write_checkpoint(plan, tmp_path / "out") / "config.json").read_bytes() == path.read_bytes()
    assert plan.notes == ("config.json says nowhere how many blocks there are: write there 2",)


def test_model_without_its_last_blocks_is_not_taken_for_one_of_another_depth(llama: Catalog) -> None:
    with pytest.raises(IncompleteError, match="a llama model of 3 blocks"):
        plan_hf(stacked(llama, [0, 1]), weights_only=True)


def test_model_with_a_hole_is_not_written(llama: Catalog) -> None:
    weights = {name: tensor for name, tensor in llama.weights.items() if ".layers.1." not in name}

    with pytest.raises(IncompleteError, match=r"layers\.1\."):
        plan_hf(replace(llama, weights=weights), weights_only=True)


def test_other_number_of_blocks_of_several_kinds_is_refused(llama: Catalog, tmp_path: Path) -> None:
    config = json.loads((LLAMA / "config.json").read_text()) | {"layer_types": ["full", "sliding", "full"]}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    files = (SmallFile(name="config.json", path=path, nbytes=path.stat().st_size),)

    with pytest.raises(UnsupportedError, match="several kinds"):
        plan_hf(replace(stacked(llama, [0, 1]), files=files), num_blocks=2)


def test_entries_that_name_code_are_not_written(llama: Catalog, tmp_path: Path) -> None:
    source = Path(shutil.copytree(LLAMA, tmp_path / "checkpoint-4"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))

    written = write_checkpoint(plan_hf(open_hf(source)), tmp_path / "out")

    assert json.loads((written / "config.json").read_text()) == config


def test_opening_and_planning_need_no_torch() -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom llmtailor.formats.hf import open_hf, plan_hf\n"
        f"plan_hf(open_hf(Path({str(LLAMA)!r})))\n"
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
