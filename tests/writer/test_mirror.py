"""The second tier, while everything works."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import memory_directory, overwrite
from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import InvalidInputError, LockedError, SupersededWarning, TailorWarning, WriteError
from llmtailor.load import load_model, load_optimizers
from llmtailor.model_state import read_model
from llmtailor.resume import find_resumable
from llmtailor.storage import LocalFileSystem, list_checkpoints, list_set_aside
from llmtailor.verify import verify_checkpoint
from llmtailor.writer.mirror import Mirror, MirrorHandle
from mounts import Mounts
from tiny_models import assert_same, build_llama, snapshot_model, snapshot_optimizer
from writer.first_tiers import Training, assert_same_checkpoint, save_run


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints 1 to 5 of a run; do not change them."""
    return save_run(tmp_path_factory.mktemp("saved") / "run", range(1, 6))


@pytest.fixture
def mirror(saved: list[Path], tmp_path: Path) -> Iterator[Mirror]:
    mirror = Mirror(tmp_path / "mirror", first=saved[0].parent)
    yield mirror
    mirror.close()


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    mounts = Mounts(tmp_path)
    yield mounts
    mounts.close()


class GatedFileSystem(LocalFileSystem):
    """Makes no file until it is let."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.reached = threading.Event()

    def create(self, path: Path, mode: int = 0o444) -> int:
        self.reached.set()
        assert self.gate.wait(60)
        return super().create(path, mode)


class HeldMirror:
    """A mirror that stands in the middle of copying the first checkpoint until ``let_go``."""

    def __init__(self, path: Path, saved: list[Path], **options: Any) -> None:
        self.filesystem = GatedFileSystem()
        self.mirror = Mirror(path, first=saved[0].parent, filesystem=self.filesystem, **options)
        self.first = self.mirror.submit(saved[0])
        assert self.filesystem.reached.wait(60)

    def let_go(self) -> None:
        self.filesystem.gate.set()


@pytest.fixture
def held(saved: list[Path], tmp_path: Path) -> Iterator[HeldMirror]:
    held = HeldMirror(tmp_path / "mirror", saved)
    yield held
    held.let_go()
    held.mirror.close()


def steps_in(directory: Path) -> list[int]:
    return [entry.step for entry in list_checkpoints(directory)]


def mirror_all(mirror: Mirror, checkpoints: list[Path]) -> list[MirrorHandle]:
    handles = []
    for checkpoint in checkpoints:
        handles.append(mirror.submit(checkpoint))
        handles[-1].result()
    return handles


@pytest.mark.parametrize("is_first_in_memory", [False, True])
def test_copy_on_another_file_system_is_the_same_checkpoint(tmp_path: Path, is_first_in_memory: bool) -> None:
    with memory_directory() as memory:
        first, second = (memory, tmp_path) if is_first_in_memory else (tmp_path, memory)
        checkpoints = save_run(first / "run", range(1, 4))
        mirror = Mirror(second / "mirror", first=first / "run")
        handles = mirror_all(mirror, checkpoints)
        mirror.close()
        assert [handle.path for handle in handles] == [second / "mirror" / path.name for path in checkpoints]
        for handle, checkpoint in zip(handles, checkpoints, strict=True):
            assert handle.path is not None
            assert_same_checkpoint(handle.path, checkpoint)
            assert verify_checkpoint(handle.path).is_good
            assert not verify_checkpoint(handle.path).unlisted
            assert handle.state == "mirrored"


def test_unchanged_layers_are_links_inside_the_mirror(mirror: Mirror, saved: list[Path]) -> None:
    handles = mirror_all(mirror, saved[:3])
    second, third = (handle.result() for handle in handles[1:])
    before = set(open_checkpoint(second).manifest.all_files)
    manifest = open_checkpoint(third).manifest
    shared = [file for file in manifest.all_files if file in before]
    written = [file for file in manifest.all_files if file not in before]
    assert sum(file.path.startswith("optimizer/") for file in shared) >= 2
    assert written
    assert all((second / file.path).samefile(third / file.path) for file in shared)
    assert all((third / file.path).stat().st_nlink == 1 for file in written)
    assert not any((saved[2] / file.path).samefile(third / file.path) for file in manifest.all_files)
    stats = handles[2].stats
    assert stats is not None
    assert stats.linked_nbytes == sum(file.bytes for file in shared)
    assert stats.copied_nbytes == sum(file.bytes for file in written)
    assert stats.secs > 0


def test_checkpoint_after_one_that_was_not_mirrored_is_whole(mirror: Mirror, saved: list[Path]) -> None:
    handles = mirror_all(mirror, [saved[0], saved[2]])
    assert verify_checkpoint(handles[1].result()).is_good
    shutil.rmtree(mirror.path / "checkpoint-1")
    assert verify_checkpoint(handles[1].result()).is_good


@pytest.mark.parametrize("how", ["removed", "cut off"])
def test_file_that_the_mirror_lost_is_copied_anew(mirror: Mirror, saved: list[Path], how: str) -> None:
    mirror_all(mirror, saved[:1])
    lost = next(layer for layer in open_checkpoint(saved[1]).manifest.layers if layer.step == 1).weights.path
    if how == "removed":
        (mirror.path / "checkpoint-1" / lost).unlink()
    else:
        overwrite(mirror.path / "checkpoint-1" / lost, b"")
    assert verify_checkpoint(mirror.submit(saved[1]).result()).is_good


@pytest.mark.parametrize("width", [1501, 2048])
def test_large_files_of_any_size_are_copied_whole(tmp_path: Path, width: int) -> None:
    """Several pieces, the last of which ends at a block or inside one, around the page cache where that works."""

    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(width, width)])

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
            return type("Output", (), {"loss": self.layers[0](torch.ones(width)).sum()})

    training = Training(tmp_path / "run", model=Wide())
    checkpoint = training.save(1)
    training.close()
    mirror = Mirror(tmp_path / "mirror", first=tmp_path / "run")
    copy = mirror.submit(checkpoint).result()
    mirror.close()
    assert max(file.bytes for file in open_checkpoint(copy).manifest.all_files) > 8 * 2**20
    assert_same_checkpoint(copy, checkpoint)


def test_training_resumes_from_the_mirror_when_the_first_tier_is_gone(tmp_path: Path) -> None:
    training = Training(tmp_path / "run")
    mirror = Mirror(tmp_path / "mirror", first=tmp_path / "run")
    mirror_all(mirror, [training.save(step) for step in (1, 2)])
    training.close()
    shutil.rmtree(tmp_path / "run")
    mirror.close()

    again = Mirror(tmp_path / "mirror", first=tmp_path / "run")
    found = find_resumable(again.run)
    assert found is not None
    model = build_llama(num_layers=2, seed=9)
    optimizer = torch.optim.AdamW(model.parameters())
    load_model(found, read_model(model))
    load_optimizers(found, read_model(model), [optimizer])
    again.close()
    manifest = found.manifest
    newest = {layer.name for layer in manifest.layers if layer.step == manifest.step}
    of_newest = {tensor.fqn for tensor in manifest.tensors if tensor.layer in newest}
    assert of_newest
    expected = {name: value for name, value in snapshot_model(training.model).items() if name in of_newest}
    assert_same({name: value for name, value in snapshot_model(model).items() if name in of_newest}, expected)
    states = snapshot_optimizer(training.model, training.optimizer)
    loaded = snapshot_optimizer(model, optimizer)
    of_states = [name for name in states if name.rpartition(".")[0] in of_newest]
    assert of_states
    assert_same({name: loaded[name] for name in of_states}, {name: states[name] for name in of_states})


def test_newest_wins(held: HeldMirror, saved: list[Path]) -> None:
    done: list[int] = []
    waiting = [held.mirror.submit(path, on_done=lambda handle: done.append(handle.step)) for path in saved[1:5]]
    assert [handle.state for handle in waiting] == ["superseded"] * 3 + ["waiting"]
    assert [handle.superseded_by for handle in waiting] == [3, 4, 5, None]
    assert repr(waiting[0]) == "MirrorHandle(step=2, superseded by checkpoint-3)"
    assert not waiting[0].wait(0)
    held.let_go()
    newest = held.mirror.path / "checkpoint-5"
    assert [handle.result() for handle in waiting] == [newest] * 4
    held.mirror.close()
    assert [handle.error for handle in waiting] == [None] * 4
    assert [handle.path for handle in waiting] == [None] * 3 + [newest]
    assert held.mirror.num_superseded == 3
    assert steps_in(held.mirror.path) == [1, 5]
    assert verify_checkpoint(newest).is_good
    assert done == [5, 4, 3, 2]


def test_what_waits_or_is_copied_is_pending(held: HeldMirror, saved: list[Path]) -> None:
    for path in saved[1:4]:
        held.mirror.submit(path)
    assert held.mirror.pending_steps == {1, 4}
    assert not held.mirror.drain(0.01)
    held.let_go()
    assert held.mirror.drain()
    assert held.mirror.pending_steps == frozenset()


def test_retention_of_the_mirror_is_its_own(saved: list[Path], tmp_path: Path) -> None:
    mirror = Mirror(tmp_path, first=saved[0].parent, keep=2, keep_consistent=False)
    for path in saved[:4]:
        mirror.submit(path, pinned={2}).result()
    assert steps_in(tmp_path) == [2, 4]
    mirror.submit(saved[4]).result()
    mirror.close()
    assert steps_in(tmp_path) == [4, 5]
    assert all(verify_checkpoint(entry.path).is_good for entry in list_checkpoints(tmp_path))
    assert len(saved) == len(steps_in(saved[0].parent))


def test_consistent_checkpoint_stays_in_the_mirror(saved: list[Path], tmp_path: Path) -> None:
    mirror = Mirror(tmp_path, first=saved[0].parent, keep=2)
    mirror_all(mirror, saved)
    mirror.close()
    assert steps_in(tmp_path) == [1, 5]


def test_checkpoint_that_the_mirror_has_costs_nothing(mirror: Mirror, saved: list[Path]) -> None:
    first, again = mirror_all(mirror, [saved[0], saved[0]])
    assert again.result() == first.result()
    assert again.stats is not None
    assert (again.stats.copied_nbytes, again.stats.linked_nbytes) == (0, 0)
    assert list_set_aside(mirror.path) == []


def test_copy_that_comes_too_late_does_not_set_a_newer_one_aside(mirror: Mirror, saved: list[Path]) -> None:
    _, late = mirror_all(mirror, [saved[2], saved[1]])
    assert (late.state, late.superseded_by, late.path) == ("superseded", 3, mirror.path / "checkpoint-3")
    assert steps_in(mirror.path) == [3]
    assert list_set_aside(mirror.path) == []


def test_mirror_follows_a_run_that_went_back(tmp_path: Path) -> None:
    """The first tier set steps 2 and 3 aside and saved step 2 again: so does the mirror, and links what is the same."""
    training = Training(tmp_path / "run")
    mirror = Mirror(tmp_path / "mirror", first=tmp_path / "run", on_warning=lambda warning: None)
    mirror_all(mirror, [training.save(step) for step in (1, 2, 3)])
    training.checkpointer.begin(open_checkpoint(tmp_path / "run" / "checkpoint-1"))
    handle = mirror_all(mirror, [training.save(2)])[0]
    mirror.close()
    with pytest.warns(SupersededWarning):
        training.close()
    assert_same_checkpoint(tmp_path / "mirror" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    assert steps_in(tmp_path / "mirror") == [1, 2]
    assert [entry.step for entry in list_set_aside(tmp_path / "mirror")] == [2, 3]
    assert handle.stats is not None
    assert handle.stats.linked_nbytes > 0


def test_another_run_in_the_mirror_is_set_aside(saved: list[Path], tmp_path: Path) -> None:
    mirror = Mirror(tmp_path / "mirror", first=saved[0].parent)
    mirror_all(mirror, saved[:2])
    mirror.close()
    warnings: list[TailorWarning] = []
    other = save_run(tmp_path / "other", range(7, 9), seed=1)
    mirror = Mirror(tmp_path / "mirror", first=tmp_path / "other", on_warning=warnings.append)
    mirror_all(mirror, other)
    mirror.close()
    assert steps_in(tmp_path / "mirror") == [7, 8]
    assert [entry.step for entry in list_set_aside(tmp_path / "mirror")] == [1, 2]
    assert [type(warning) for warning in warnings] == [SupersededWarning] * 2


@pytest.mark.parametrize("place", [".", "inside", "checkpoint-1/inside", "..", "../..", "../link", "../link/inside"])
@pytest.mark.parametrize("is_there", [True, False])
def test_mirror_that_is_not_apart_from_the_run_is_refused(tmp_path: Path, place: str, is_there: bool) -> None:
    run = tmp_path / "runs" / "a"
    if is_there:
        run.mkdir(parents=True)
    run.parent.mkdir(exist_ok=True)
    (run.parent / "link").symlink_to(run)
    with pytest.raises(InvalidInputError) as caught:
        Mirror(run / place, first=run)
    assert caught.value.kind == "nested-mirror"
    assert not (run / "_staging").exists()


def test_mirror_beside_the_run_is_fine(tmp_path: Path) -> None:
    Mirror(tmp_path / "run-mirror", first=tmp_path / "run").close()


def test_run_that_is_reached_through_a_link_is_still_apart_from_its_mirror(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with pytest.raises(InvalidInputError):
        Mirror(tmp_path / "disk" / "run" / "mirror", first=tmp_path / "link" / "run")


def test_run_that_is_mounted_in_two_places_is_still_apart_from_its_mirror(tmp_path: Path, mounts: Mounts) -> None:
    run, alias = tmp_path / "run", mounts.mount("tmpfs", "size=1m")
    run.mkdir()
    mounts._call(["mount", "--bind", str(run), str(alias)])
    mounts._mounted.append(alias)
    with pytest.raises(InvalidInputError):
        Mirror(alias / "mirror", first=run)


def test_relative_paths_stay_what_they_were(saved: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    held = HeldMirror(Path("mirror"), saved)
    monkeypatch.chdir(saved[0].parent)
    waiting = held.mirror.submit(Path(saved[1].name))
    monkeypatch.chdir("/")
    held.let_go()
    assert waiting.result() == tmp_path / "mirror" / "checkpoint-2"
    held.mirror.close()


def test_mirror_has_one_writer(mirror: Mirror, saved: list[Path]) -> None:
    with pytest.raises(LockedError):
        Mirror(mirror.path, first=saved[0].parent)
    mirror.close()
    Mirror(mirror.path, first=saved[0].parent).close()


def test_close_copies_what_waits_and_then_takes_nothing_more(held: HeldMirror, saved: list[Path]) -> None:
    waiting = held.mirror.submit(saved[1])
    held.let_go()
    held.mirror.close()
    held.mirror.close()
    assert waiting.state == "mirrored"
    assert steps_in(held.mirror.path) == [1, 2]
    with pytest.raises(WriteError) as caught:
        held.mirror.submit(saved[2])
    assert caught.value.kind == "closed"


def test_waits_can_be_interrupted_and_close_still_works(held: HeldMirror) -> None:
    main = threading.main_thread().ident
    assert main is not None
    for wait in (held.first.result, held.mirror.drain, held.mirror.close):
        timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            wait()
        timer.join()
    held.let_go()
    held.mirror.close()
    assert held.first.state == "mirrored"


def test_thread_that_submitted_may_end(held: HeldMirror, saved: list[Path]) -> None:
    handles: list[MirrorHandle] = []
    thread = threading.Thread(target=lambda: handles.append(held.mirror.submit(saved[1])))
    thread.start()
    thread.join()
    held.let_go()
    assert handles[0].result() == held.mirror.path / "checkpoint-2"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_neither_copies_nor_waits(held: HeldMirror, saved: list[Path]) -> None:
    """Not even for a lock that some thread of the parent held at that moment."""
    is_held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with held.mirror._changed:
            is_held.set()
            let_go.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert is_held.wait(60)
    pid = os.fork()
    if pid == 0:
        try:
            # A child that hangs is killed, and its status says so.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)
            os._exit(0 if _behaves_as_a_child(held, saved) else 1)
        finally:
            os._exit(2)
    let_go.set()
    holder.join()
    assert os.waitpid(pid, 0)[1] == 0
    held.let_go()
    held.mirror.close()
    assert held.first.state == "mirrored"


def _behaves_as_a_child(held: HeldMirror, saved: list[Path]) -> bool:
    mirror, kinds = held.mirror, []
    for call in (held.first.result, lambda: mirror.submit(saved[1])):
        try:
            call()
        except WriteError as err:
            kinds.append(err.kind)
    is_waiting = mirror.drain() or held.first.wait()
    mirror.close()
    return kinds == ["closed", "closed"] and not is_waiting and mirror.pending_steps == frozenset()
