"""How others write the same state: durable writers, and savers beside which training goes on.

A durable writer is a function of a directory that returns when every byte, and every name, is on the disk. A saver is
what a training loop calls. Nothing here is a copy of a peer's code: each is called as its documentation says.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

PIECE_NBYTES = 8 * 2**20


def flat_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters and their moments by name, live, as safetensors takes them."""
    state = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        state |= {f"{leaf}.{name}": optimizer.state[parameter][leaf] for leaf in ("exp_avg", "exp_avg_sq")}
    return state


def nested_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a training script hands to ``torch.save`` and to DCP."""
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def nbytes_of(state: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def fsync_tree(directory: Path) -> None:
    """Files, directory and the directory's own name."""
    for path in [*directory.rglob("*"), directory, directory.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def save_safetensors(state: dict[str, torch.Tensor], directory: Path) -> None:
    save_file(state, directory / "state.safetensors")
    fsync_tree(directory)


def save_torch(state: dict[str, Any], directory: Path) -> None:
    torch.save(state, directory / "state.pt")
    fsync_tree(directory)


def save_dcp(state: dict[str, Any], directory: Path, threads: int) -> None:
    """It syncs its files and renames; the directory is synced for it."""
    with _quiet():
        dcp.save(state, storage_writer=_dcp_writer(directory, threads), no_dist=True)
    fsync_tree(directory)


class RawDisk:
    """What the disk takes from this process: one slab, laid out and resident, O_DIRECT in pieces, by two threads."""

    def __init__(self, nbytes: int, threads: int = 2) -> None:
        self._nbytes = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._threads = threads
        self._slab = mmap.mmap(-1, self._nbytes)
        torch.frombuffer(self._slab, dtype=torch.uint8).random_()

    def write(self, directory: Path) -> None:
        descriptor = os.open(directory / "slab", os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
        os.posix_fallocate(descriptor, 0, self._nbytes)
        offsets = iter(range(0, self._nbytes, PIECE_NBYTES))
        threads = [threading.Thread(target=self._write, args=(descriptor, offsets)) for _ in range(self._threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.fsync(descriptor)
        assert os.fstat(descriptor).st_size == self._nbytes
        os.close(descriptor)
        fsync_tree(directory)

    def _write(self, descriptor: int, offsets: Iterator[int]) -> None:
        view = memoryview(self._slab)
        for offset in offsets:  # a range's iterator may be shared: its next() holds the interpreter lock
            piece = view[offset : offset + PIECE_NBYTES]
            assert os.pwrite(descriptor, piece, offset) == len(piece)


class Saver(Protocol):
    """What a training loop calls of one method."""

    def save(self) -> None:
        """In the training thread, between two steps; returns when forward and backward may go on."""

    def before_update(self) -> None:
        """In the training thread, before the optimizer changes the state."""

    def is_done(self) -> bool:
        """True if the last save is on the disk, or with its method would be called so."""

    def wait(self) -> None:
        """Until it is done."""

    def clean(self) -> None:
        """Wait, and remove what was written."""

    def close(self) -> None:
        """Let go of everything."""


class _Directories:
    """A new directory for each save."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._numbers = itertools.count(1)

    def make(self) -> Path:
        path = self._root / f"save-{next(self._numbers)}"
        path.mkdir(parents=True)
        return path

    def clean(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)


class BlockingSaver:
    """Training waits for all of it."""

    def __init__(self, root: Path, write: Callable[[Path], object]) -> None:
        self._directories = _Directories(root)
        self._write = write

    def save(self) -> None:
        self._write(self._directories.make())

    def before_update(self) -> None:
        pass

    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def clean(self) -> None:
        self._directories.clean()

    def close(self) -> None:
        self.clean()


class AsyncDCP:
    """``dcp.async_save`` as torchtitan drives it: one stager kept, staging in its thread, waited for before the update.

    Without a GPU there is nothing to pin, and a copy that does not block needs a stream; shared memory is for the
    process alone. The process needs a process group; the thread is spared the collectives.

    Source: torch 2.13, distributed/checkpoint/staging.py (StagingOptions), state_dict_saver.py (async_save);
    torchtitan, components/checkpoint.py (maybe_wait_for_staging).
    """

    def __init__(self, root: Path, state: Callable[[], dict[str, Any]], *, process: bool, threads: int) -> None:
        self._directories = _Directories(root)
        self._state = state
        self._process = process
        self._threads = threads
        has_gpu = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=has_gpu,
                use_shared_memory=process,
                use_async_staging=True,
                use_non_blocking_copy=has_gpu,
            )
        )
        self._response: Any = None
        if process and not dist.is_initialized():
            os.environ.setdefault("MASTER_ADDR", "localhost")
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def save(self) -> None:
        self.wait()
        with _quiet():
            self._response = dcp.async_save(
                self._state(),
                storage_writer=_dcp_writer(self._directories.make(), self._threads),
                async_checkpointer_type=AsyncCheckpointerType.PROCESS
                if self._process
                else AsyncCheckpointerType.THREAD,
                async_stager=self._stager,
                no_dist=not self._process,
            )

    def before_update(self) -> None:
        if self._response is not None:
            self._response.staging_completion.result()

    def is_done(self) -> bool:
        return bool(self._response.upload_completion.done())

    def wait(self) -> None:
        if self._response is not None:
            self._response.upload_completion.result()

    def clean(self) -> None:
        self.wait()
        self._response = None
        self._directories.clean()

    def close(self) -> None:
        self.clean()
        self._stager.close()


class PlainAsyncDCP:
    """``dcp.async_save`` with its defaults, as its documentation calls it: staged into new memory before it returns.

    Source: torch 2.13, distributed/checkpoint/state_dict_saver.py (async_save).
    """

    def __init__(self, root: Path, state: Callable[[], dict[str, Any]]) -> None:
        self._directories = _Directories(root)
        self._state = state
        self._future: Any = None

    def save(self) -> None:
        self.wait()
        with _quiet():
            self._future = dcp.async_save(self._state(), checkpoint_id=self._directories.make(), no_dist=True)

    def before_update(self) -> None:
        pass

    def is_done(self) -> bool:
        return bool(self._future.done())

    def wait(self) -> None:
        if self._future is not None:
            self._future.result()

    def clean(self) -> None:
        self.wait()
        self._future = None
        self._directories.clean()

    def close(self) -> None:
        self.clean()


class DeepSpeedFast:
    """DeepSpeed's fast checkpoint engine: ``torch.save`` into a file object that writes with libaio and O_DIRECT.

    It is synchronous. DeepSpeed builds its operator when it is first used, for minutes, and for a CPU leaves out the
    library itself and one trivial operator (``cast_to_byte_tensor``): here the first is loaded, the second a view, so
    that the engine is measured all the same.

    Source: DeepSpeed 0.19.8, runtime/checkpoint_engine/fast_checkpoint_engine.py, io/fast_file_writer.py,
    ops/op_builder/async_io.py (extra_ldflags), ops/op_builder/cpu/no_impl.py.

    Raises:
        NotBuiltError: It cannot be had on this machine.
    """

    def __init__(self) -> None:
        os.environ.setdefault("DS_PIN_MEMORY_BACKEND", "native")  # torch pins nothing without a GPU
        try:
            ctypes.CDLL("libaio.so.1", mode=ctypes.RTLD_GLOBAL)
            from deepspeed.ops.op_builder import AsyncIOBuilder

            if not AsyncIOBuilder().is_compatible():
                raise NotBuiltError("async_io needs the headers of libaio")
            self._engine = _deepspeed_engine()
        except (ImportError, OSError, RuntimeError, ValueError) as err:
            raise NotBuiltError(" ".join(str(err).split())[:200]) from err

    def write(self, state: dict[str, Any], directory: Path) -> None:
        self._engine.save(state, str(directory / "state.pt"))
        fsync_tree(directory)


class NotBuiltError(Exception):
    """A peer that needs something this machine has not."""


def find_deepspeed() -> tuple[DeepSpeedFast | None, str]:
    """The engine, and in words what became of it."""
    try:
        return DeepSpeedFast(), "built"
    except NotBuiltError as err:
        return None, f"not built: {err}"


def _deepspeed_engine() -> Any:
    import deepspeed.io.fast_file_writer as fast_file_writer
    from deepspeed.runtime.checkpoint_engine import FastCheckpointEngine
    from deepspeed.runtime.model_checkpointing.config import get_checkpoint_config
    from deepspeed.runtime.model_checkpointing.data_parallel_writer_factory import DataParallelWriterConfig
    from deepspeed.runtime.swap_tensor.aio_config import get_aio_config

    if not torch.cuda.is_available():
        operators = SimpleNamespace(cast_to_byte_tensor=lambda tensors: [_bytes_of(tensor) for tensor in tensors])
        fast_file_writer.UtilsBuilder = lambda: SimpleNamespace(load=lambda: operators)
    writer = {"checkpoint": {"checkpoint_serialization": False, "writer": {"type": "fast"}}}
    config = SimpleNamespace(checkpoint_config=get_checkpoint_config(writer), aio_config=get_aio_config({}))
    alone = DataParallelWriterConfig(world_size=1, rank=0, global_rank=0, local_rank=0, pure_dp=True)
    return FastCheckpointEngine(config, alone, False)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).flatten()


def _dcp_writer(directory: Path, threads: int) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(directory, sync_files=True, thread_count=threads)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns that it works alone, which is what is wanted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
