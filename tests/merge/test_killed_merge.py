"""A merge that is killed at any moment: the sources are as they were, and the result is whole or not there."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import llmtailor
from llmtailor.formats import detect_format, open_catalog
from llmtailor.manifest import digest_of

NUM_KILLS = 8


@pytest.fixture(scope="module")
def masters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of 48 MB as the Trainer writes them, of random numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("masters")
    for step in (1, 2):
        torch.manual_seed(step)
        config = LlamaConfig(
            vocab_size=2000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
        )
        model = LlamaForCausalLM(config)
        groups = [[p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]]
        optimizer = torch.optim.AdamW([{"params": group} for group in groups])
        for parameter in model.parameters():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.randn_like(parameter),
                "exp_avg_sq": torch.rand_like(parameter),
            }
        directory = root / f"checkpoint-{step}"
        model.save_pretrained(directory)
        torch.save(optimizer.state_dict(), directory / "optimizer.pt")
        (directory / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    return root


def digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): digest_of(path.read_bytes())
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "deepspeed", "dcp", "tailored"])
def test_killed_merge_harms_nothing(to: str, masters: Path, tmp_path: Path) -> None:
    options = {"ranks": 2} if to in ("deepspeed", "dcp") else {}
    sources = [tmp_path / f"checkpoint-{step}" for step in (1, 2)]
    for source in sources:
        llmtailor.export(masters / source.name, source, to=to, **options)
    before = {source: digests(source) for source in sources}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'base: {sources[1]}\nlayers: {{"layers.1, layers.3, embed_tokens": {sources[0]}}}\n')
    command = [sys.executable, "-m", "llmtailor", "merge", str(recipe)]
    start = time.monotonic()
    subprocess.run([*command, str(tmp_path / "reference")], check=True, capture_output=True)
    whole_secs = time.monotonic() - start
    expected = contents(tmp_path / "reference")
    chance = random.Random(3)
    out = tmp_path / "merged"
    num_killed = 0
    for _ in range(NUM_KILLS):
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.3, 1.0) * whole_secs)
        process.kill()
        num_killed += process.wait() != 0
        assert {source: digests(source) for source in sources} == before
        if out.exists():
            assert contents(out) == expected
            out.rename(tmp_path / f"finished-{time.monotonic_ns()}")
    assert num_killed > 0
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert contents(out) == expected
    assert {source: digests(source) for source in sources} == before
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def contents(checkpoint: Path) -> dict[str, str]:
    """Digests of a result, less what says when it was made."""
    assert open_catalog(checkpoint).format == detect_format(checkpoint)
    return {name: digest for name, digest in digests(checkpoint).items() if name != "tailor.json"}
