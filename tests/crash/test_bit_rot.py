"""Any change of any file of a real checkpoint is found, by verify and by resume, which falls back."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults import flip_bit, memory_directory, overwrite
from llmtailor.errors import IntegrityError, NotFoundError, QuarantineWarning, TailorError
from llmtailor.manifest import MANIFEST_NAME
from llmtailor.resume import find_resumable, open_resumable
from llmtailor.storage import RunDirectory
from llmtailor.verify import verify_checkpoint

KINDS = {
    "manifest": MANIFEST_NAME,
    "index": "model.safetensors.index.json",
    "config": "config.json",
    "generation config": "generation_config.json",
    "weights of a block": "model-layers.001.safetensors",
    "weights of the embedding": "model-embed_tokens.safetensors",
    "optimizer of a block": "optimizer/layers.001.safetensors",
    "optimizer of the norm": "optimizer/norm.safetensors",
    "random numbers": "rng_state.pth",
    "scheduler": "scheduler.pt",
    "data position": "data.pt",
    "progress": "run_state.json",
}
FLIPS_PER_KIND = 200


@pytest.fixture(scope="module")
def pristine() -> Iterator[Path]:
    """A run of a real model with two checkpoints that share no inode."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmtailor import Run

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    with memory_directory() as directory:
        run = Run(directory / "linked", model, optimizer, scheduler=scheduler, strategy="parity", save_steps=1)
        batches = run.batches(torch.utils.data.DataLoader(torch.randint(0, 32, (24, 6)), batch_size=4))
        for step, batch in enumerate(batches, start=1):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            scheduler.step()
            run.step(step)
        run.close()
        (directory / "run").mkdir()
        for step in (5, 6):  # copied, so that a change of one is no change of the other
            shutil.copytree(directory / "linked" / f"checkpoint-{step}", directory / "run" / f"checkpoint-{step}")
        yield directory / "run"


@pytest.fixture
def run(pristine: Path) -> Iterator[RunDirectory]:
    """The run, open; whatever a test did to the newest checkpoint is undone after it."""
    newest, spare = pristine / "checkpoint-6", pristine.parent / "spare"
    shutil.copytree(newest, spare)
    run = RunDirectory(pristine)
    yield run
    run.close()
    for path in (newest, pristine / "_checkpoint-6.bad"):
        shutil.rmtree(path, ignore_errors=True)
    spare.rename(newest)


def is_detected(run: RunDirectory, *names: str) -> None:
    """The newest checkpoint is refused because of one of these files, set aside, and the one before it taken."""
    newest = run.path / "checkpoint-6"
    report = verify_checkpoint(newest)
    assert not report.is_good, names
    found_bad = {problem.path for problem in report.problems}
    # Against a manifest of another time, other files are wrong too.
    assert found_bad == set(names) or (MANIFEST_NAME in names and MANIFEST_NAME in found_bad)
    with pytest.raises((TailorError, NotFoundError)):
        open_resumable(newest)
    with pytest.warns(QuarantineWarning, match=r"checkpoint-6 does not verify .*kept as _checkpoint-6\.bad"):
        found = find_resumable(run)
    assert found is not None
    assert found.manifest.step == 5
    bad = run.path / "_checkpoint-6.bad"
    assert all(name in (bad / "tailor-reason.txt").read_text() for name in names)
    (bad / "tailor-reason.txt").unlink()
    bad.rename(newest)


def test_undamaged_run_is_good(run: RunDirectory) -> None:
    for step in (5, 6):
        report = verify_checkpoint(run.path / f"checkpoint-{step}")
        assert report.is_good
        assert report.unlisted == ()
        on_disk = {path.name for path in (run.path / "checkpoint-6").rglob("*") if path.is_file()}
        assert {Path(name).name for name in KINDS.values()} <= on_disk


@pytest.mark.parametrize("kind", KINDS)
def test_single_flipped_bits(run: RunDirectory, kind: str) -> None:
    path = run.path / "checkpoint-6" / KINDS[kind]
    chance = random.Random(kind)
    num_bits = 8 * path.stat().st_size
    bits = {0, 63, 64, num_bits - 1, *(chance.randrange(num_bits) for _ in range(FLIPS_PER_KIND))}
    for bit in sorted(bits):
        flip_bit(path, bit)
        is_detected(run, KINDS[kind])
        flip_bit(path, bit)
    assert verify_checkpoint(run.path / "checkpoint-6").is_good


@pytest.mark.slow
def test_every_bit_of_the_manifest(run: RunDirectory) -> None:
    path = run.path / "checkpoint-6" / MANIFEST_NAME
    for byte in range(path.stat().st_size):
        bit = 8 * byte + byte % 8
        flip_bit(path, bit)
        assert not verify_checkpoint(run.path / "checkpoint-6").is_good, bit
        flip_bit(path, bit)


def truncate(path: Path) -> None:
    overwrite(path, path.read_bytes()[:-1])


def truncate_to_nothing(path: Path) -> None:
    overwrite(path, b"")


def extend(path: Path) -> None:
    overwrite(path, path.read_bytes() + b"\0")


def zero_a_page(path: Path) -> None:
    content = path.read_bytes()
    start = min(len(content) // 2, 4096 * (len(content) // 8192))
    overwrite(path, content[:start] + bytes(min(4096, len(content) - start)) + content[start + 4096 :])


def zero_all(path: Path) -> None:
    """What a file is after a power failure where only its size was written."""
    overwrite(path, bytes(path.stat().st_size))


def replace_by_symlink(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_dangling_symlink(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def replace_by_older(path: Path) -> None:
    """The file of the checkpoint before: whole, and not this one's."""
    newest = next(parent for parent in path.parents if parent.name == "checkpoint-6")
    overwrite(path, (newest.with_name("checkpoint-5") / path.relative_to(newest)).read_bytes())


def remove(path: Path) -> None:
    path.unlink()


CHANGES = [truncate, truncate_to_nothing, extend, zero_a_page, zero_all, replace_by_symlink, replace_by_pipe]
CHANGES += [replace_by_directory, replace_by_dangling_symlink, replace_by_older, remove]
# A directory that has no manifest is not known to be ours; a link to nothing, a pipe and a directory are none.
NO_MANIFEST = {replace_by_pipe, replace_by_directory, replace_by_dangling_symlink, remove}
# Of both steps, or taken over by the later from the earlier.
SAME_AS_BEFORE = {
    "config", "generation config", "index", "random numbers", "weights of a block", "optimizer of a block",
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
@pytest.mark.parametrize("kind", KINDS)
def test_other_damage(run: RunDirectory, kind: str, change: Callable[[Path], None]) -> None:
    before = (run.path / "checkpoint-6" / KINDS[kind]).read_bytes()
    change(run.path / "checkpoint-6" / KINDS[kind])
    if change is replace_by_older and (run.path / "checkpoint-6" / KINDS[kind]).read_bytes() == before:
        assert kind in SAME_AS_BEFORE
    elif kind == "manifest" and change in NO_MANIFEST:
        with pytest.warns(QuarantineWarning, match="no manifest"):
            found = find_resumable(run)
        assert found is not None
        assert found.manifest.step == 5
    else:
        is_detected(run, KINDS[kind])


def test_two_files_swapped(run: RunDirectory) -> None:
    newest = run.path / "checkpoint-6"
    one, other = newest / "optimizer/layers.000.safetensors", newest / "optimizer/layers.001.safetensors"
    one.rename(newest / "aside")
    other.rename(one)
    (newest / "aside").rename(other)
    is_detected(run, "optimizer/layers.000.safetensors", "optimizer/layers.001.safetensors")


def test_checkpoint_under_the_name_of_another_step(run: RunDirectory) -> None:
    shutil.rmtree(run.path / "checkpoint-6")
    shutil.copytree(run.path / "checkpoint-5", run.path / "checkpoint-6")
    is_detected(run, MANIFEST_NAME)


def test_file_nobody_listed_is_reported_and_does_no_harm(run: RunDirectory) -> None:
    (run.path / "checkpoint-6" / "optimizer" / "note.txt").write_text("by hand")
    report = verify_checkpoint(run.path / "checkpoint-6")
    assert report.is_good
    assert report.unlisted == ("optimizer/note.txt",)


def test_all_checkpoints_damaged(run: RunDirectory) -> None:
    spare = run.path.parent / "spare-5"
    shutil.copytree(run.path / "checkpoint-5", spare)
    try:
        for step in (5, 6):
            flip_bit(run.path / f"checkpoint-{step}" / "scheduler.pt", 77)
        with pytest.warns(QuarantineWarning), pytest.raises(IntegrityError) as caught:
            find_resumable(run)
        assert caught.value.kind == "none-verifies"
        assert "checkpoint-5" in str(caught.value)
    finally:
        shutil.rmtree(run.path / "_checkpoint-5.bad")
        spare.rename(run.path / "checkpoint-5")
