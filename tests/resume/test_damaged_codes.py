"""Codes that are not whole, or not of this layer, are refused before anything is changed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from coded_checkpoints import change_codes, make_writable, write_manifest
from faults import flip_bit, memory_directory, overwrite
from llmtailor import Run
from llmtailor.checkpoint import Checkpoint
from llmtailor.codecs import BASE_KEY
from llmtailor.errors import (
    FormatError,
    IntegrityError,
    NotFoundError,
    QuarantineWarning,
)
from llmtailor.load import load_model, plan_load
from llmtailor.manifest import LayerRecord, digest_of
from llmtailor.model_state import read_model
from llmtailor.resume import Fill, load_named, load_resumable
from llmtailor.storage import RunDirectory
from llmtailor.verify import verify_checkpoint
from resume.coded_loops import WIDTH, Loop, Record, at, check, coded, train
from tiny_models import (
    Snapshot,
    assert_same,
    build_llama,
    snapshot_model,
)
from writer.trainings import state_of


class Live:
    """A model and its optimizer, as a loop has them."""

    def __init__(self) -> None:
        self.model = build_llama(num_layers=2, width=WIDTH, seed=3)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.model_state = read_model(self.model)
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    def plan(self, found: Checkpoint) -> Fill:
        return plan_load(found, self.model_state, [self.optimizer]).fill

    def state(self) -> Snapshot:
        return state_of(self.model, self.optimizer)


@dataclass(frozen=True, kw_only=True)
class Pristine:
    """A run whose checkpoints share no inode: 1 is exact, 2 and 3 have codes."""

    path: Path
    truth: Mapping[int, Snapshot]
    """What each checkpoint has to be loaded as."""


@pytest.fixture(scope="module", params=["q8", "compact"])
def pristine(request: pytest.FixtureRequest) -> Iterator[Pristine]:
    live, record = Live(), Record()
    generator = torch.Generator().manual_seed(0)
    with memory_directory() as directory:
        with Run(directory / "linked", live.model, live.optimizer, rest=request.param, strategy="parity") as run:
            for step in (1, 2, 3):
                for parameter in live.model.parameters():
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
                live.optimizer.step()
                record.states[step] = live.state()
                run.save(step)
        truth = {step: check(at(directory / "linked", step), record) for step in (1, 2, 3)}
        for step in (1, 2, 3):
            shutil.copytree(directory / f"linked/checkpoint-{step}", directory / f"run/checkpoint-{step}")
        yield Pristine(path=directory / "run", truth=truth)


def files_of_codes(checkpoint: Checkpoint) -> list[str]:
    """Of the first layer in codes."""
    return [file.path for file in coded(checkpoint)[0].files]


def check_refused(pristine: Pristine, broken: str, *, is_known_before: bool) -> None:
    """Whoever names the checkpoint is refused, and whoever does not gets the one before; ``verify`` names the file.

    Args:
        pristine: The run.
        broken: What is wrong with checkpoint 3: a file, relative to it.
        is_known_before: Nothing live may be changed by the one who named it.
    """
    newest, live = pristine.path / "checkpoint-3", Live()
    problems = verify_checkpoint(newest).problems
    assert broken in {problem.path for problem in problems}, problems
    before = live.state()
    with pytest.raises(IntegrityError) as caught:
        load_named(newest, live.plan)
    assert broken in str(caught.value)
    if is_known_before:
        assert_same(live.state(), before)
        assert "overwritten" not in str(caught.value)
    run = RunDirectory(pristine.path)
    try:
        with pytest.warns(QuarantineWarning, match="checkpoint-3 does not verify") as warned:
            found = load_resumable(run, live.plan)
    finally:
        run.close()
        bad = pristine.path / "_checkpoint-3.bad"
        (bad / "tailor-reason.txt").unlink()
        bad.rename(newest)
    assert broken in str(warned[0].message)
    assert found is not None
    assert found.manifest.step == 2
    assert_same(live.state(), pristine.truth[2])


def flip_and_check(pristine: Pristine, num_flips: int) -> None:
    newest = at(pristine.path, 3)
    chance = random.Random(5)
    for name in files_of_codes(newest):
        file = newest.path / name
        num_bits = 8 * file.stat().st_size
        bits = [0, 70, num_bits - 1]
        bits += [chance.randrange(8 * 1200) for _ in range(num_flips)]  # where the header says something
        bits += [chance.randrange(num_bits) for _ in range(num_flips)]
        for bit in bits:
            flip_bit(file, bit)
            check_refused(pristine, name, is_known_before=False)
            flip_bit(file, bit)
    live = Live()
    load_named(newest.path, live.plan)
    assert_same(live.state(), pristine.truth[3])


def test_a_flipped_bit_in_codes_or_what_they_are_relative_to_is_found(pristine: Pristine) -> None:
    flip_and_check(pristine, 2)


@pytest.mark.slow
def test_many_flipped_bits_in_codes_or_what_they_are_relative_to_are_found(pristine: Pristine) -> None:
    flip_and_check(pristine, 60)


def lose(file: Path) -> None:
    file.unlink()


def cut_off(file: Path) -> None:
    overwrite(file, file.read_bytes()[:-1])


def cut_to_its_header(file: Path) -> None:
    overwrite(file, file.read_bytes()[:4096])


def make_longer(file: Path) -> None:
    overwrite(file, file.read_bytes() + b"\0")


@pytest.mark.parametrize("harm", [lose, cut_off, cut_to_its_header, make_longer], ids=lambda harm: harm.__name__)
def test_codes_or_what_they_are_relative_to_that_are_not_whole_are_refused_before_anything_is_changed(
    pristine: Pristine, harm: Callable[[Path], None]
) -> None:
    newest = at(pristine.path, 3)
    for name in files_of_codes(newest):
        content = (newest.path / name).read_bytes()
        harm(newest.path / name)
        live = Live()
        before = live.state()
        with pytest.raises((IntegrityError, NotFoundError)):
            live.plan(newest)
        assert_same(live.state(), before)
        check_refused(pristine, name, is_known_before=True)
        (newest.path / name).unlink(missing_ok=True)
        (newest.path / name).write_bytes(content)
        (newest.path / name).chmod(0o444)


def exchange_codes(checkpoint: Checkpoint, layer: LayerRecord, codes: bytes) -> None:
    """Have a checkpoint hold another codes file of a layer, published as if a save had written it."""
    assert layer.encoding is not None
    path = checkpoint.path / layer.encoding.codes.path
    path.write_bytes(codes)
    record = layer.encoding.codes.model_copy(update={"bytes": len(codes), "digest": digest_of(codes)})
    encoding = layer.encoding.model_copy(update={"codes": record})
    layers = [
        each.model_copy(update={"encoding": encoding}) if each.name == layer.name else each
        for each in checkpoint.manifest.layers
    ]
    write_manifest(checkpoint.path, layers)


def test_codes_of_another_layer_are_refused_before_anything_is_changed(pristine: Pristine, tmp_path: Path) -> None:
    newest = copy_run(pristine, tmp_path)
    first, other = coded(newest)[:2]
    assert other.encoding is not None
    exchange_codes(newest, first, (newest.path / other.encoding.codes.path).read_bytes())
    checkpoint, live = at(tmp_path, 3), Live()
    before = live.state()
    for load in (lambda: live.plan(checkpoint), lambda: load_model(checkpoint, live.model_state)):
        with pytest.raises(FormatError) as caught:
            load()
        assert caught.value.kind in ("schema", "codes-base")
        assert "codes/" in str(caught.value.path)
    assert_same(live.state(), before)
    check_refused(Pristine(path=tmp_path, truth=pristine.truth), coded_path(checkpoint), is_known_before=True)


def coded_path(checkpoint: Checkpoint) -> str:
    encoding = coded(checkpoint)[0].encoding
    assert encoding is not None
    return encoding.codes.path


def copy_run(pristine: Pristine, directory: Path) -> Checkpoint:
    """A copy that may be changed; its newest checkpoint."""
    for step in (2, 3):
        shutil.copytree(pristine.path / f"checkpoint-{step}", directory / f"checkpoint-{step}")
        make_writable(directory / f"checkpoint-{step}")
    return at(directory, 3)


def test_codes_of_other_weights_are_refused_before_anything_is_changed(pristine: Pristine, tmp_path: Path) -> None:
    """As if a save had mixed up which exact file its codes are relative to."""
    layer, other = coded(copy_run(pristine, tmp_path))[:2]

    def claim(arrays: Any, metadata: dict[str, str]) -> None:
        # Codes with weights of their own step say nothing of others.
        assert metadata.get(BASE_KEY) in (layer.weights.digest, None)
        metadata[BASE_KEY] = other.weights.digest

    change_codes(tmp_path / "checkpoint-3", layer.name, claim)
    checkpoint, live = at(tmp_path, 3), Live()
    before = live.state()
    for load in (lambda: live.plan(checkpoint), lambda: load_model(checkpoint, live.model_state)):
        with pytest.raises(FormatError) as caught:
            load()
        assert (caught.value.kind, caught.value.layer) == ("codes-base", layer.name)
    assert_same(live.state(), before)
    check_refused(Pristine(path=tmp_path, truth=pristine.truth), coded_path(checkpoint), is_known_before=True)


def test_codes_of_the_same_layer_at_another_save_are_refused(tmp_path: Path) -> None:
    """Their base was another file of the same name."""
    record = Record()
    train(tmp_path, 5, record, rest="q8")
    earlier, later = at(tmp_path, 3), at(tmp_path, 5)
    layer = coded(later)[0]
    same = next(each for each in coded(earlier) if each.name == layer.name)
    assert same.encoding is not None
    assert same.weights.digest != layer.weights.digest
    make_writable(later.path)
    codes = (earlier.path / same.encoding.codes.path).read_bytes()
    (later.path / same.encoding.codes.path).unlink()
    exchange_codes(later, layer, codes)
    model = build_llama(width=WIDTH, seed=9)
    before = snapshot_model(model)
    with pytest.raises(IntegrityError) as caught:
        load_model(at(tmp_path, 5), read_model(model))
    assert caught.value.kind == "codes-base"
    assert_same(snapshot_model(model), before)
    with pytest.warns(QuarantineWarning, match=f"checkpoint-5 does not verify .*{same.encoding.codes.path}"):
        loop = Loop(tmp_path, record, rest="q8", seed=3)
    with loop:
        assert loop.step == 4
        assert_same(loop.state(), check(at(tmp_path, 4), record))
