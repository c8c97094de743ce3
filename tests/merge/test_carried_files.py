"""Small files of a merge: training state of ``state_from``, the model's of ``base``, and no weights of others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmtailor
from formats.deepspeed_files import copy_fixture, model_file
from llmtailor.checkpointer import Checkpointer
from llmtailor.formats.deepspeed import open_deepspeed
from llmtailor.formats.hf import open_hf
from llmtailor.formats.small_names import is_tokenizer, is_training_state, is_weights
from llmtailor.formats.torch_files import open_torch_file
from tiny_models import build_llama

peft = pytest.importorskip("peft")

# peft 0.21 still says "gradient_checkpointing" to transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            "state",
            "trainer_state.json training_args.bin scheduler.pt scaler.pt rng_state.pth rng_state_3.pth optimizer.pt "
            "run_state.json metrics.json latest lightning.pt deepspeed_state.pt ema.pt data_1.pt random_states_0.pkl "
            "custom_checkpoint_0.pkl sampler.bin dl_state_dict_1.bin dcp/names.json dcp/rest.rank-00000.json "
            "dcp/rest.rank-00001.pt dcp/rest.rank-00000.safetensors model_ema.pt callback_state.json",
        ),
        (
            "model",
            "config.json generation_config.json README.md adapter_config.json modules.json quantize_config.json "
            "LICENSE dataset_infos.json scheduler_config.json data_config.json modelcard.json",
        ),
        (
            "tokenizer",
            "tokenizer.json tokenizer_config.json tokenizer.model.v3 tekken.json qwen.tiktoken spm.model source.spm "
            "bpe.codes merges.txt vocab.json entity_vocab.json vocab-src.json sentencepiece.bpe.model spiece.model "
            "special_tokens_map.json added_tokens.json chat_template.json chat_template.jinja "
            "additional_chat_templates/rag.jinja preprocessor_config.json processor_config.json "
            "video_preprocessor_config.json prophetnet.tokenizer normalizer.json",
        ),
        (
            "weights",
            "pytorch_model.bin pytorch_model-00001-of-00002.bin pytorch_model_fp32.bin pytorch_model.bin.index.json "
            "model.safetensors model.fp16.safetensors model-00002-of-00003.safetensors model.safetensors.index.json "
            "adapter_model.safetensors adapter_model.bin second/adapter_model.safetensors consolidated.00.pth "
            "tf_model.h5 flax_model.msgpack model.Q4_0.gguf",
        ),
    ],
)
def test_a_file_is_of_one_kind(kind: str, names: str) -> None:
    for name in names.split():
        found = {"state": is_training_state(name), "tokenizer": is_tokenizer(name), "weights": is_weights(name)}
        assert [each for each, is_it in found.items() if is_it] == [each for each in found if each == kind], name


# A plain loop, its objects and its metrics.


class Counter:
    """An object of the user."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def loop(directory: Path, objects: Mapping[str, Counter], *, use_cache: bool = True) -> tuple[llmtailor.Run, Any, Any]:
    """A run, its optimizer and its scheduler; ``use_cache`` tells its configuration from another's."""
    model = build_llama(num_layers=2, dropout=0.0)
    model.config.use_cache = use_cache
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return llmtailor.Run(directory, model, optimizer, scheduler=scheduler, state=objects), optimizer, scheduler


def train(directory: Path, objects: Mapping[str, Counter], *, use_cache: bool = True) -> None:
    """Four steps with checkpoints at 2 and 4."""
    torch.manual_seed(3)
    run, optimizer, scheduler = loop(directory, objects, use_cache=use_cache)
    with run:
        for step in range(1, 5):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            scheduler.step()
            for each in objects.values():
                each.count = 100 * step
            if step % 2 == 0:
                run.save(step, metrics={"loss": float(step)}).result()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``with`` keeps an object, ``without`` none."""
    directory = tmp_path_factory.mktemp("runs")
    train(directory / "with", {"average": Counter(), "more_2": Counter()}, use_cache=False)
    train(directory / "without", {})
    return directory


def merge(base: Path, state_from: Path, output: Path, **options: Any) -> Any:
    recipe = output.parent / f"{output.name}.yaml"
    recipe.write_text(f'base: {base}\nlayers: {{"layers.*": {state_from}}}\nstate_from: {state_from}\n')
    return llmtailor.merge(recipe, output, **options)


@pytest.mark.parametrize("base", ["with", "without"])
def test_training_state_is_that_of_state_from_and_the_configuration_that_of_base(
    base: str, runs: Path, tmp_path: Path
) -> None:
    older, newer, merged = runs / base / "checkpoint-2", runs / "with" / "checkpoint-4", tmp_path / "checkpoint-4"
    merge(older, newer, merged)

    for name in ("average.pt", "more_2.pt", "scheduler.pt", "rng_state.pth", "run_state.json", "metrics.json"):
        assert (merged / name).read_bytes() == (newer / name).read_bytes(), name
    assert (merged / "config.json").read_bytes() == (older / "config.json").read_bytes()
    objects = {"average": Counter(), "more_2": Counter()}
    run, _, scheduler = loop(tmp_path / "resumed", objects)
    with run:
        assert run.resume(merged) == 4
    assert [each.count for each in objects.values()] == [400, 400]
    assert scheduler.last_epoch == 4


def test_objects_that_state_from_does_not_have_are_left_out(runs: Path, tmp_path: Path) -> None:
    merged = tmp_path / "checkpoint-4"
    merge(runs / "with" / "checkpoint-2", runs / "without" / "checkpoint-4", merged)

    assert not (merged / "average.pt").exists()
    run, _, _ = loop(tmp_path / "resumed", {})
    with run:
        assert run.resume(merged) == 4


def test_weights_alone_have_no_training_state(runs: Path, tmp_path: Path) -> None:
    merge(runs / "with" / "checkpoint-2", runs / "with" / "checkpoint-4", tmp_path / "merged", weights_only=True)

    found = {path.name for path in (tmp_path / "merged").iterdir() if not path.name.startswith("model")}
    assert found == {"config.json", "generation_config.json", "llmtailor_merge.json", "tailor.json"}


def test_objects_are_not_named_without_their_state(runs: Path, tmp_path: Path) -> None:
    """A directory for the Trainer has no place for a loop's objects."""
    plan = llmtailor.export(runs / "with" / "checkpoint-4", tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf" / "run_state.json").exists()
    assert any("run_state.json" in note and "'average', 'more_2'" in note for note in plan.notes)

    llmtailor.export(runs / "with" / "checkpoint-4", tmp_path / "dcp", to="dcp")
    assert (tmp_path / "dcp" / "average.pt").exists()
    llmtailor.export(tmp_path / "dcp", tmp_path / "back", to="tailored")  # of others' *.pt none is read there
    assert not (tmp_path / "back" / "run_state.json").exists()

    plan = llmtailor.export(runs / "without" / "checkpoint-4", tmp_path / "plain", to="hf")
    assert (tmp_path / "plain" / "run_state.json").exists()
    assert not any("run_state.json" in note for note in plan.notes)


def test_a_file_of_that_name_that_is_not_ours_is_copied_as_it_is(tmp_path: Path) -> None:
    source = tmp_path / "source"
    build_llama(num_layers=2).save_pretrained(source)
    for text in ("not JSON", '{"objects": 3}'):
        (source / "run_state.json").write_text(text)
        plan = llmtailor.export(source, tmp_path / f"out-{len(text)}", weights_only=False)
        assert not any("run_state.json" in note for note in plan.notes)


def test_counters_of_an_engine_are_those_of_state_from(tmp_path: Path) -> None:
    model = build_llama(num_layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    checkpointer = Checkpointer(tmp_path / "run", strategy="full")
    for step in (1, 2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        engine = {"global_steps": step, "lr_scheduler": {"last_epoch": step}}
        state = {"engine": engine, "client_state": {"epoch": step}}
        checkpointer.save(
            step, model, [optimizer], lambda path, state=state: torch.save(state, path / "deepspeed_state.pt")
        ).result()
    checkpointer.close()
    output = tmp_path / "out"
    merge(tmp_path / "run" / "checkpoint-1", tmp_path / "run" / "checkpoint-2", output, to="deepspeed", ranks=2)

    found: Any = open_torch_file(output / "global_step2" / "mp_rank_00_model_states.pt")
    assert (found["global_steps"], found["lr_scheduler"], found["epoch"]) == (2, {"last_epoch": 2}, 2)


# Weights beside the checkpoint's own.


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of an adapter at steps 1 and 2."""
    directory = tmp_path_factory.mktemp("adapted") / "run"
    run, optimizer = adapter_loop(directory)
    with run:
        for step in (1, 2):
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            run.save(step).result()
    return directory


def adapter_loop(directory: Path) -> tuple[llmtailor.Run, torch.optim.Optimizer]:
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(build_llama(num_layers=2, dropout=0.0), config)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    return llmtailor.Run(directory, model, optimizer), optimizer


def test_the_adapter_of_one_source_is_not_passed_off_as_the_merged_one(adapted: Path, tmp_path: Path) -> None:
    recipe, merged = tmp_path / "recipe.yaml", tmp_path / "checkpoint-2"
    recipe.write_text(f'base: {adapted}/checkpoint-2\nlayers: {{"*": {adapted}/checkpoint-1}}\n')
    plan = llmtailor.merge(recipe, merged)

    assert not (merged / "adapter_model.safetensors").exists()
    assert any("adapter_model.safetensors" in note for note in plan.notes)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B"
    older = load_file(adapted / "checkpoint-1" / "adapter_model.safetensors")[f"{name}.weight"]
    assert torch.equal(load_file(merged / "model-layers.000.safetensors")[f"{name}.default.weight"], older)
    run, optimizer = adapter_loop(tmp_path / "resumed")
    with run:
        assert run.resume(merged) == 2
    assert any(torch.equal(each, older) for each in optimizer.param_groups[0]["params"])


def test_the_adapter_goes_along_with_layers_that_are_all_its_own(adapted: Path, tmp_path: Path) -> None:
    source = adapted / "checkpoint-2"
    plan = llmtailor.export(source, tmp_path / "checkpoint-2")

    name = "adapter_model.safetensors"
    assert (tmp_path / "checkpoint-2" / name).read_bytes() == (source / name).read_bytes()
    assert not any(name in note for note in plan.notes)


def with_others_weights(directory: Path, shift: float) -> Path:
    """A DeepSpeed checkpoint as ``zero_to_fp32.py`` and PEFT leave it, with all its weights moved."""
    checkpoint = copy_fixture("z2-bf16", directory)
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    states = torch.load(model_file(checkpoint), weights_only=False)
    for tensor in states["module"].values():
        tensor += shift
    torch.save(states, model_file(checkpoint))
    torch.save({name: tensor + shift for name, tensor in weights.items()}, checkpoint / "pytorch_model.bin")
    save_file({"lora_A": torch.full((2,), shift)}, checkpoint / "adapter_model.safetensors")
    (checkpoint / "optimizer.bin").write_bytes(b"another's")
    torch.save({"count": 1}, checkpoint / "custom_checkpoint_0.pkl")
    return checkpoint


def test_others_weights_beside_a_deepspeed_checkpoint_are_left_where_they_are(tmp_path: Path) -> None:
    base, other = with_others_weights(tmp_path / "a", 0.0), with_others_weights(tmp_path / "b", 1.0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'base: {base}\nlayers: {{"*": {other}}}\nstate_from: {base}\n')
    llmtailor.merge(recipe, tmp_path / "out")

    found = {path.name for path in (tmp_path / "out").iterdir()}
    carried = {"config.json", "custom_checkpoint_0.pkl", "rng_state_0.pth", "rng_state_1.pth", "scheduler.pt"}
    assert found == {*carried, "trainer_state.json", "global_step3", "latest", "llmtailor_merge.json"}


def test_others_weights_may_be_of_any_size(tmp_path: Path) -> None:
    checkpoint = with_others_weights(tmp_path, 0.0)
    with (checkpoint / "pytorch_model.bin").open("ab") as file:
        file.truncate(2**30 + 1)
    assert open_deepspeed(checkpoint).step == 3


# The tokenizer.

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tekken.json", "qwen.tiktoken", "spm.model", "source.spm", "bpe.codes",
    "merges.txt", "vocab.json", "chat_template.jinja", "tokenizer.model.v3", "additional_chat_templates/rag.jinja",
    "preprocessor_config.json",
)  # fmt: skip


def with_tokenizer(checkpoint: Path, text: str) -> Path:
    for name in (*TOKENIZER_FILES, "modules.json"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text(text)
    return checkpoint


@pytest.mark.parametrize("to", ["hf", "tailored", "dcp"])
def test_the_tokenizer_is_taken_as_a_whole(to: str, runs: Path, tmp_path: Path) -> None:
    sources = []
    for name in "ab":
        llmtailor.export(runs / "without" / "checkpoint-4", tmp_path / name, to="hf")
        sources.append(with_tokenizer(tmp_path / name, name))
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(f"models: [{{model: {sources[0]}}}]\nmerge_method: passthrough\ntokenizer_source: {sources[1]}\n")
    llmtailor.merge(recipe, output, to=to)
    assert {name: (output / name).read_text() for name in TOKENIZER_FILES} == dict.fromkeys(TOKENIZER_FILES, "b")
    assert (output / "modules.json").read_text() == "a"

    # What was written is found again, and left out where it is not wanted.
    llmtailor.export(output, tmp_path / "again", to="hf")
    assert all((tmp_path / "again" / name).exists() for name in TOKENIZER_FILES)
    llmtailor.export(output, tmp_path / "bare", to="hf", copy_tokenizer=False)
    assert not any((tmp_path / "bare" / name).exists() for name in TOKENIZER_FILES)
    assert (tmp_path / "bare" / "modules.json").exists()


def test_templates_that_lead_out_of_a_checkpoint_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    build_llama(num_layers=2).save_pretrained(source)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "rag.jinja").write_text("mine")
    (source / "additional_chat_templates").symlink_to(tmp_path / "secret")
    with pytest.raises(llmtailor.TailorError) as caught:
        open_hf(source)
    assert "rag.jinja" in str(caught.value)
