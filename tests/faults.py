"""What the durability tests share: a file system that fails when told to, and runs of tiny made-up checkpoints."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmtailor.checkpoint import Checkpoint
from llmtailor.formats.safetensors import Layout, plan_layout
from llmtailor.manifest import (
    FileRecord,
    GroupRecord,
    LayerRecord,
    Manifest,
    OptimizerRecord,
    Parent,
    TensorRecord,
    World,
    Writer,
)
from llmtailor.storage import LocalFileSystem, RunDirectory, checkpoint_name
from llmtailor.storage.staging import translate_os_errors
from llmtailor.tensors import TensorMeta
from llmtailor.writer import Engine, LinkedFile, SaveCost, SaveHandle, SaveJob, WrittenLayer

LAYERS = ("embed_tokens", "layers.0", "layers.1", "norm")
RUN_ID = "0" * 32


class SimulatedCrash(BaseException):
    """The machine stopped here. Not an ``Exception``: whoever catches those must not be able to go on."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong at one operation.

    ``before`` fails without doing it, ``after`` does it and then fails, ``half`` writes half of the bytes and fails.
    """

    at: int
    """Number of the operation, from 1."""
    errno: int | None
    """None stops the world."""
    is_persistent: bool = False
    """Everything after it fails too."""
    moment: Literal["before", "after", "half"] = "before"


class FaultyFileSystem:
    """A ``LocalFileSystem`` that counts its operations and fails at one of them.

    Operations made of others (``copy``, ``reflink``) run on this object, so their parts count and fail one by one.
    fsync does nothing: no test here pulls the plug, and thousands of runs of a scenario would wait for the disk.

    Args:
        fault: Where to fail; None never does.
        refused: Operations that always fail, with their errno.
    """

    COMPOSED = frozenset({"copy", "reflink", "_fill"})

    def __init__(self, fault: Fault | None = None, *, refused: Mapping[str, int] | None = None) -> None:
        self.fault = fault
        self.has_fired = False
        self.is_dead = False
        self.calls: list[str] = []
        self._refused = dict(refused or {})
        self._local = LocalFileSystem()
        self._open: set[int] = set()
        self._mutex = threading.Lock()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(LocalFileSystem, name)
        if name in self.COMPOSED:
            return functools.partial(method, self)
        return functools.partial(self._call, name)

    def heal(self) -> None:
        """From now on everything works."""
        self.fault = None

    def bury(self) -> None:
        """Close what the dead process left open, as the kernel does."""
        for descriptor in self._open:
            os.close(descriptor)
        self._open.clear()

    def _call(self, name: str, *args: Any) -> Any:
        with self._mutex:
            if self.is_dead:
                raise SimulatedCrash(name)
            self.calls.append(name)
            fault = self._due()
        if fault is None and name in self._refused:
            raise OSError(self._refused[name], os.strerror(self._refused[name]))
        if fault is None:
            return self._perform(name, *args)
        if fault.errno is None:
            self.is_dead = True
            raise SimulatedCrash(name)
        self._perform_in_part(fault.moment, name, *args)
        raise OSError(fault.errno, os.strerror(fault.errno))

    def _due(self) -> Fault | None:
        fault = self.fault
        if fault is None or len(self.calls) < fault.at or (len(self.calls) > fault.at and not fault.is_persistent):
            return None
        self.has_fired = True
        return fault

    def _perform(self, name: str, *args: Any) -> Any:
        if name in {"fsync", "fsync_directory"}:
            return None
        result = getattr(self._local, name)(*args)
        if name in {"create", "open_for_reading"}:
            self._open.add(result)
        if name == "close":
            self._open.discard(args[0])
        return result

    def _perform_in_part(self, moment: str, name: str, *args: Any) -> None:
        if name == "close":  # Linux lets go of the descriptor whatever it says
            self._perform(name, *args)
        elif moment == "half" and name == "write":
            self._local.write(args[0], args[1][: args[1].nbytes // 2])
        elif moment == "half" and name == "write_at":
            self._local.write_at(args[0], args[1][: args[1].nbytes // 2], args[2])
        elif moment == "after":
            result = self._perform(name, *args)
            if name in {"create", "open_for_reading"}:
                self._perform("close", result)


@dataclass(frozen=True, kw_only=True)
class FakeFile:
    """A layer file of a few bytes; looks like ``FileImage`` to the writer."""

    name: str
    layout: Layout
    content: bytes

    tensors: tuple[()] = ()
    referred: tuple[()] = ()

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    @property
    def parts(self) -> tuple[memoryview, memoryview]:
        return memoryview(self.layout.prefix), memoryview(self.content)


@dataclass(frozen=True, kw_only=True)
class FakeLayer:
    """Looks like ``LayerImage`` to the writer."""

    layer: str
    files: tuple[FakeFile, ...]
    num_updates: int

    @property
    def masters(self) -> Mapping[str, str]:
        return {}

    @property
    def sources(self) -> tuple[FakeFile, ...]:
        return self.files

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def weights(self) -> FakeFile:
        return self.files[0]

    @property
    def optimizer(self) -> FakeFile | None:
        return self.files[1] if len(self.files) == 2 else None

    def count_updates(self) -> int:
        return self.num_updates


def fake_layer(layer: str, step: int, *, has_optimizer: bool = True, numel: int = 3) -> FakeLayer:
    """A layer whose bytes follow from its name and step."""
    names = {f"model-{layer}.safetensors": f"{layer}.weight"}
    if has_optimizer:
        names[f"optimizer/{layer}.safetensors"] = f"state.{layer}.weight.exp_avg"
    files = []
    for name, tensor in names.items():
        layout = plan_layout([(tensor, TensorMeta(dtype="F32", shape=(numel,)))], {"format": "pt"})
        content = random.Random(f"{name} {step}").randbytes(4 * numel)
        files.append(FakeFile(name=name, layout=layout, content=content))
    return FakeLayer(layer=layer, files=tuple(files), num_updates=step)


def write_fake_small_files(directory: Path, step: int) -> None:
    (directory / "trainer_state.json").write_text(f'{{"global_step": {step}}}\n')
    (directory / "scheduler.pt").write_bytes(random.Random(step).randbytes(64))
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "vocab.txt").write_text("a\nb\n")


def fake_manifest(step: int, layers: Sequence[LayerRecord], /, **changes: Any) -> Manifest:
    """A valid manifest over some layers; ``changes`` replace fields and may make it invalid."""
    fields: dict[str, Any] = {
        "run_id": RUN_ID,
        "step": step,
        "save_index": max((layer.save_index for layer in layers), default=0),
        "created": "2026-01-01T00:00:00Z",
        "parent": None,
        "contents": "full",
        "strategy": "parity()",
        "world": World(size=1, sharding="none"),
        "writer": Writer(llmtailor="0", torch="0", python="0", host="here", pid=1),
        "tensors": tuple(fake_tensor(layer.name) for layer in layers),
        "optimizers": (fake_optimizer([layer.name for layer in layers]),),
        "layers": tuple(layers),
        "files": (),
    }
    return Manifest(**(fields | changes))


def fake_tensor(layer: str, **changes: Any) -> TensorRecord:
    fields: dict[str, Any] = {
        "fqn": f"{layer}.weight",
        "kind": "parameter",
        "layer": layer,
        "dtype": "F32",
        "shape": (3,),
        "trainable": True,
        "tied_to": None,
    }
    return TensorRecord(**(fields | changes))


def fake_optimizer(layers: Sequence[str]) -> OptimizerRecord:
    groups = (GroupRecord(parameters=tuple(f"{layer}.weight" for layer in layers), options={"lr": 0.1}),)
    return OptimizerRecord.model_validate({"class": "AdamW", "groups": groups})


def fake_record(layer: str, step: int, save_index: int, written: WrittenLayer) -> LayerRecord:
    is_block = layer.startswith("layers.")
    return LayerRecord(
        name=layer,
        kind="block" if is_block else "other",
        stack="layers" if is_block else None,
        index=int(layer.removeprefix("layers.")) if is_block else None,
        step=step,
        save_index=save_index,
        update_count=written.update_count if written.optimizer is not None else None,
        reason="strategy",
        drift=None,
        weights=written.weights,
        optimizer=written.optimizer,
    )


def save_fake(
    run: RunDirectory,
    step: int,
    *,
    parent: Checkpoint | None = None,
    layers: Collection[str] = LAYERS,
    run_id: str = RUN_ID,
    contents: Literal["full", "weights"] = "full",
    write_small_files: Callable[[Path, int], None] = write_fake_small_files,
    numel: int = 3,
) -> Checkpoint:
    """Save a made-up checkpoint through the real writer.

    Layers that are not in ``layers`` are linked from ``parent``; without one the save is the first of a run.
    """
    is_full = contents == "full"
    save_index = 0 if parent is None else parent.manifest.save_index + 1
    kept = {} if parent is None else {each.name: each for each in parent.manifest.layers if each.name not in layers}
    assert set(LAYERS) == {*layers, *kept}

    def build(written: Mapping[str, WrittenLayer], small: Sequence[FileRecord], cost: SaveCost) -> Manifest:
        records = [
            kept[layer] if layer in kept else fake_record(layer, step, save_index, written[layer]) for layer in LAYERS
        ]
        return fake_manifest(
            step,
            records,
            run_id=run_id,
            save_index=save_index,
            parent=None if parent is None else Parent(step=parent.manifest.step, digest=parent.digest),
            contents=contents,
            optimizers=(fake_optimizer(LAYERS),) if is_full else (),
            files=tuple(small),
            tensors=tuple(fake_tensor(layer, shape=(numel,)) for layer in LAYERS),
        )

    images: Any = [fake_layer(name, step, has_optimizer=is_full, numel=numel) for name in LAYERS if name in layers]
    links = [
        LinkedFile(record=file, source=parent.path / file.path, layer=layer.name)
        for layer in kept.values()
        for file in layer.files
        if parent is not None
    ]
    saved: list[Checkpoint] = []
    staged = run.stage(step, sum(image.nbytes for image in images), sum(len(image.files) for image in images))
    try:
        with translate_os_errors("write the small files", staged.path):
            write_small_files(staged.path, step)
    except BaseException:
        run.abandon(staged)
        raise
    job = SaveJob(
        step=step,
        staged=staged,
        images=images,
        find_base=lambda layer: None,
        plan_links=lambda written: links,
        build_manifest=build,
        is_first=lambda: parent is None,
        on_published=lambda path, manifest, digest: saved.append(
            Checkpoint(path=path, manifest=manifest, digest=digest)
        ),
        tidy_up=lambda path: None,
    )
    engine = Engine(run, pool_nbytes=2**16)
    handle = SaveHandle(step)
    try:
        engine.submit(job, handle, called=time.perf_counter())
        handle.result()
    finally:
        engine.close()
    return saved[0]


@dataclass(kw_only=True)
class RunLog:
    """What a scenario may rely on at the moment it is stopped."""

    acknowledged: dict[int, str] = field(default_factory=dict)
    """Step -> digest of the manifest; neither removed nor superseded since."""
    replacing: set[int] = field(default_factory=set)
    """Being superseded by the save under way; may be found under another name, with that save in its place."""
    removing: set[int] = field(default_factory=set)
    """Being removed; may be there or not."""
    run: RunDirectory | None = None
    """Open, if it came that far."""


def play_life_of_a_run(
    path: Path, filesystem: Any, log: RunLog, mark: Callable[[str], None] = lambda text: None
) -> None:
    """Full save, selective saves with links, retention, a step saved again, then a new run in the same directory."""

    def save(step: int, parent: Checkpoint | None, layers: Collection[str], run_id: str = RUN_ID) -> Checkpoint:
        assert log.run is not None
        log.replacing = {old for old in log.acknowledged if old >= step or parent is None}
        mark("saving")
        saved = save_fake(log.run, step, parent=parent, layers=layers, run_id=run_id)
        for old in log.replacing:
            del log.acknowledged[old]
        log.replacing = set()
        log.acknowledged[step] = saved.digest
        mark("acknowledged")
        return saved

    def remove(checkpoint: Checkpoint) -> None:
        assert log.run is not None
        log.removing = {checkpoint.manifest.step}
        mark("removing")
        log.run.remove(checkpoint.path)
        log.removing = set()
        del log.acknowledged[checkpoint.manifest.step]
        mark("removed")

    log.run = RunDirectory(path, filesystem)
    first = save(10, None, LAYERS)
    second = save(20, first, {"layers.0"})
    remove(first)
    third = save(30, second, {"embed_tokens", "layers.1"})
    save(30, third, {"norm"})
    remove(second)
    log.run.close()
    log.run = None
    log.run = RunDirectory(path, filesystem)
    save(40, None, LAYERS, run_id="1" * 32)
    log.run.close()


@contextlib.contextmanager
def memory_directory() -> Iterator[Path]:
    """A directory in memory where there is one: thousands of trees are made and removed, none has to last."""
    shared = Path("/dev/shm")
    where = shared if shared.is_dir() and os.access(shared, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="llmtailor-test-", dir=where) as path:
        yield Path(path)


def new_tree(parent: Path, name: str = "tree") -> Path:
    """An empty directory; what stood there is gone."""
    path = parent / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


def open_descriptors() -> set[str]:
    """This process's open files, by number."""
    return {name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")}


def staged_names(run: Path) -> set[str]:
    """What is in flight, the lock apart."""
    return {name for name in os.listdir(run / "_staging") if name != "lock"}


def flip_bit(path: Path, bit: int) -> None:
    """Flip one bit of a file in place, read-only or not."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << (bit % 8)
    overwrite(path, bytes(content))


def overwrite(path: Path, content: bytes) -> None:
    """Put other bytes into the same inode; for root, and for others through the mode."""
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(mode)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def expected_path(run: Path, step: int) -> Path:
    return run / checkpoint_name(step)
