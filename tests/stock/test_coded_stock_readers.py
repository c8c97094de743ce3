"""Programs that know nothing of LLMTailor read a whole model from a checkpoint in which some layers are codes.

With ``q8`` and ``q4`` a coded layer is what it was at its last exact save, with ``compact`` what it is, as BF16.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import AutoModelForCausalLM

from coded_runs import codec_for
from llmtailor import Run
from llmtailor.checkpoint import Checkpoint, open_checkpoint
from tiny_models import Snapshot, assert_same, build_llama, snapshot_model
from writer.trainings import state_of

STEPS = (1, 2, 3, 4)
RESTS = ("q8", "q4", "compact", "compact4")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}

# torch warns that it reads in one process, which is what we ask for.
alone = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")


class SavedRun:
    """A run of four saves, and what the model and the optimizer were at each."""

    def __init__(self, directory: Path, rest: str, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> None:
        self.directory = directory
        self.states: dict[int, Snapshot] = {}
        model = build_llama(width=64, tied=tied, dtype=dtype)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(3)
        with Run(directory, model, optimizer, strategy="parity", rest=rest, save_steps=1) as run:
            for step in STEPS:
                for parameter in model.parameters():
                    # Any gradient will do: readers do not care what the model was taught.
                    parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                optimizer.step()
                run.step(step)
                self.states[step] = state_of(model, optimizer)

    def checkpoints(self) -> Iterable[Checkpoint]:
        return (open_checkpoint(self.directory / f"checkpoint-{step}") for step in STEPS)

    def plain_weights(self, checkpoint: Checkpoint) -> Snapshot:
        """What the weights files must hold, under every name; and it is the newest where that is what they are for."""
        layers = {layer.name: layer for layer in checkpoint.manifest.layers}
        expected = {}
        for tensor in checkpoint.manifest.tensors:
            layer = layers[tensor.layer]
            weight = self.states[layer.step][tensor.fqn]
            is_rounded = layer.encoding is not None and layer.encoding.base == "rounded"
            if is_rounded and codec_for(tensor.fqn, weight, ("tail8", "", "")) == "tail8":
                weight = weight.bfloat16()
            expected[tensor.fqn] = weight
        return expected

    def check_what_is_coded(self, checkpoint: Checkpoint, rest: str) -> None:
        """Else the tests would show nothing."""
        coded = [layer for layer in checkpoint.manifest.layers if layer.encoding is not None]
        step = checkpoint.manifest.step
        assert len(coded) == (0 if step == 1 else 3), [layer.name for layer in coded]
        is_new = rest.startswith("compact")
        assert all((layer.step == step) == is_new for layer in coded)


def close(found: torch.Tensor, live: torch.Tensor) -> bool:
    """As near as BF16 is."""
    return bool(((found.double() - live.double()).abs() <= live.double().abs() * 2.0**-8).all())


@pytest.mark.parametrize("rest", RESTS)
def test_from_pretrained_reads_every_checkpoint(rest: str, tmp_path: Path) -> None:
    saved = SavedRun(tmp_path, rest)
    for checkpoint in saved.checkpoints():
        saved.check_what_is_coded(checkpoint, rest)
        expected = {fqn: weight.float() for fqn, weight in saved.plain_weights(checkpoint).items()}
        loaded, report = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, output_loading_info=True, dtype=torch.float32
        )
        problems = {key: sorted(map(str, value)) for key, value in report.items() if value}
        assert not problems
        found = snapshot_model(loaded)
        assert_same(found, expected)
        live = saved.states[checkpoint.manifest.step]
        if rest.startswith("compact"):
            assert all(close(found[fqn], live[fqn]) for fqn in found)
            if checkpoint.manifest.step > 1:
                assert not all(torch.equal(found[fqn], live[fqn]) for fqn in found)


@pytest.mark.parametrize("rest", ["q8", "compact"])
def test_a_model_with_a_tied_head_is_read(rest: str, tmp_path: Path) -> None:
    saved = SavedRun(tmp_path, rest, tied=True)
    is_embedding_coded = set()
    for checkpoint in saved.checkpoints():
        embedding = next(layer for layer in checkpoint.manifest.layers if layer.name == "embed_tokens")
        is_embedding_coded.add(embedding.encoding is not None)
        loaded = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
        expected = {fqn: weight.float() for fqn, weight in saved.plain_weights(checkpoint).items()}
        assert_same(snapshot_model(loaded), expected)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert is_embedding_coded == {False, True}


@pytest.mark.parametrize("rest", ["q8", "compact"])
def test_a_model_in_bf16_is_read(rest: str, tmp_path: Path) -> None:
    saved = SavedRun(tmp_path, rest, dtype=torch.bfloat16)
    for checkpoint in saved.checkpoints():
        saved.check_what_is_coded(checkpoint, rest)
        loaded = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.bfloat16)
        expected = saved.plain_weights(checkpoint)
        assert_same(snapshot_model(loaded), expected)
        if rest == "compact":
            assert_same(expected, {fqn: saved.states[checkpoint.manifest.step][fqn] for fqn in expected})


@alone
@pytest.mark.parametrize("rest", RESTS)
def test_distributed_checkpoint_reads_weights_and_what_there_is_of_an_optimizer(rest: str, tmp_path: Path) -> None:
    saved = SavedRun(tmp_path, rest)
    for checkpoint in saved.checkpoints():
        expected = saved.plain_weights(checkpoint)
        assert_same(_read_distributed(checkpoint.path, expected), expected)
        state = {}
        for layer in checkpoint.manifest.layers:
            if layer.optimizer is not None:
                fqns = {tensor.fqn for tensor in checkpoint.manifest.tensors if tensor.layer == layer.name}
                state |= {
                    key: value
                    for key, value in saved.states[layer.step].items()
                    if key.startswith("state.") and key.removeprefix("state.").rpartition(".")[0] in fqns
                }
        assert_same(_read_distributed(checkpoint.path / "optimizer", state), state)
        reader = dcp.HuggingFaceStorageReader(str(checkpoint.path / "optimizer"))
        assert set(reader.read_metadata().state_dict_metadata) == set(state)


@alone
@pytest.mark.parametrize("rest", RESTS)
def test_distributed_checkpoint_lists_exactly_the_tensors_held(rest: str, tmp_path: Path) -> None:
    """The index at the top leads to weights files alone, never to codes."""
    saved = SavedRun(tmp_path, rest)
    for checkpoint in saved.checkpoints():
        reader = dcp.HuggingFaceStorageReader(str(checkpoint.path))
        listed = reader.read_metadata().state_dict_metadata
        assert set(listed) == {tensor.fqn for tensor in checkpoint.manifest.tensors}
        dtypes = {fqn: each.properties.dtype for fqn, each in listed.items()}
        assert dtypes == {fqn: weight.dtype for fqn, weight in saved.plain_weights(checkpoint).items()}


def _read_distributed(directory: Path, like: Snapshot) -> Snapshot:
    target = {name: torch.full_like(tensor, 7) for name, tensor in like.items()}
    dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(directory)), no_dist=True)
    return target
