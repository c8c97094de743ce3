"""A ``StorageReader`` for checkpoints of our own, whatever wrote them: ``dcp.save``, ``Run``, a Trainer, or a merge.

    read_metadata   (all ranks)   which checkpoint -> its keys, each tensor as one chunk
    read_data       (all ranks)   what this rank wants of which tensors -> every file that has some of it, read once

DCP asks for boxes of whole tensors; which files those are in, how they were cut, and whether they are codes is for
``load.plan_targets``. So a checkpoint of any world is loaded on any other, and each file is digested as it is read.
"""

from __future__ import annotations

import functools
import io
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ...checkpoint import Checkpoint, open_checkpoint
from ...errors import FormatError, IntegrityError, NotFoundError, QuarantineWarning
from ...layer_reading import CheckedFile
from ...load import SavedState, plan_targets, read_saved_states
from ...manifest import MANIFEST_NAME, FileRecord
from ...meeting import Meeting
from ...optimizer_values import restore_state
from ...ranks import join_ranks
from ...resume_together import follow_search, lead_search
from ...shards import Shard, whole_shard
from ...state_keys import state_key
from ...storage import FileReader, checkpoint_name, list_checkpoints, read_files
from ...tensor_bytes import meta_of, torch_dtype
from ...tensor_filling import Target
from ...verify import changed_bytes, open_published
from .saved_keys import SavedKey, read_keys
from .state_names import Names

__all__ = ["TailorReader"]

_STEP = re.compile(r"(?:step|checkpoint)-([0-9]+)")


class TailorReader(StorageReader):
    """Has ``dcp.load`` read a checkpoint of ours, with resharding.

    ::

        dcp.load(state_dict, storage_reader=TailorReader("runs/a"))

    Of a run the newest checkpoint that verifies is taken: every rank reads its share of the bytes, and they agree. One
    that does not verify is passed over with a warning, and left where it is. A checkpoint that is named is taken, or
    refused. Whatever is loaded is digested as it is read. Element types are cast where the state dict has another.

    Args:
        path: A run, or a checkpoint.
        model: What the model is called in the state dict, as dotted keys; empty if its tensors are at the top. None:
            as when it was saved, or ``model``.
        optimizer: Likewise, or ``optim``.
        is_alone: This process loads alone, though it is one of several (``no_dist=True``).
        process_group: The one that is passed to DCP, if it is not of all ranks in their order.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        model: str | None = None,
        optimizer: str | None = None,
        is_alone: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._path = Path(path)
        self._target = self._path
        self._names = None if model is None and optimizer is None else Names(model=model, optimizer=optimizer)
        self._is_alone = is_alone
        self._group = process_group
        self._keys: Mapping[str, SavedKey] = {}
        self._found: Checkpoint | None = None
        self._error: BaseException | None = None
        self.checkpoint: Checkpoint | None = None
        """The one that was loaded last, on this rank."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Load this checkpoint next: a path, or one of the run by its step (``step-400``). Called on all ranks."""
        self._target = self._path
        if checkpoint_id is None:
            return
        named = Path(checkpoint_id)
        match = _STEP.fullmatch(named.name)
        of_run = self._path / checkpoint_name(int(match.group(1))) if match is not None else named
        self._target = named if (named / MANIFEST_NAME).exists() or match is None else of_run

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether DCP may pick this reader by the id alone: it may not."""
        return False

    def read_metadata(self) -> Metadata:
        """The checkpoint's keys; called on all ranks.

        What is wrong is raised by ``set_up_storage_reader``: of what this raises, DCP makes an AssertionError.

        Source: torch 2.13, distributed/checkpoint/state_dict_loader.py (_load_state_dict, local_step).
        """
        self._error, self._found, self._keys = None, None, {}
        try:
            self._found = self._find()
            self._keys = read_keys(self._found, self._names)
        except Exception as err:
            self._error = err
        described = {key: _describe(saved) for key, saved in self._keys.items()}
        return Metadata(described, planner_data={key: saved.path for key, saved in self._keys.items()})

    def _find(self) -> Checkpoint:
        if (self._target / MANIFEST_NAME).exists():
            return open_checkpoint(self._target)
        meeting = Meeting(None if self._is_alone else join_ranks(self._group))
        size, rank = (1, 0) if meeting.ranks is None else (meeting.ranks.size, meeting.ranks.rank)

        def examine(found: Checkpoint) -> str | None:
            return _find_damage(found, found.manifest.all_files[rank::size])

        if meeting.is_coordinator:
            found = lead_search(meeting, lambda look: _take_newest(self._target, look), examine)
        else:
            found = follow_search(meeting, examine)
        if found is None:
            raise NotFoundError(
                "there is no checkpoint of ours in the run",
                kind="missing-checkpoint",
                path=self._target,
                expected="checkpoint-<step>, or a checkpoint itself",
            )
        return found

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Called on all ranks.

        Raises:
            NotFoundError: There is no checkpoint.
            IntegrityError: None of the run verifies, or what was opened of the one that was named does not.
            FormatError: It cannot be understood.
        """
        if self._error is not None:
            raise self._error

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what this rank wants; called on all ranks.

        Raises:
            IntegrityError, NotFoundError, FormatError: A file is not what was published. Tensors were partly filled.
            OSError: The device failed.
        """
        assert self._found is not None
        tensors = [item for item in plan.items if item.type is not LoadItemType.BYTE_IO]
        _Reading(self._found, self._keys, planner).read(tensors)
        found = self._found
        # Of all files of the optimizer the headers, read when the first value of its state is asked for.
        read_states = functools.cache(lambda: read_saved_states(found))
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                value = _value_of(found, self._keys[item.storage_index.fqn], read_states)
                planner.load_bytes(item, _pickle(value))
        self.checkpoint = self._found
        future: Future[None] = Future()
        future.set_result(None)
        return future


def _value_of(checkpoint: Checkpoint, saved: SavedKey, read_states: Callable[[], Mapping[str, SavedState]]) -> Any:
    if saved.kind == "value":
        return saved.value
    state = read_states()[saved.fqn]
    return _read_state_value(checkpoint, saved, state.metas, state.notes)


def _describe(saved: SavedKey) -> STORAGE_TYPES:
    """To DCP each tensor is one chunk; it then asks once for each shard that is wanted."""
    if saved.meta is None:
        return BytesStorageMetadata()
    size = torch.Size(saved.meta.shape)
    chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=torch_dtype(saved.meta.dtype)), size=size, chunks=[chunk]
    )


def _pickle(value: Any) -> io.BytesIO:
    """As DCP hands values over. Not the bytes of a file: DCP unpickles whatever it is given."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def _read_state_value(
    checkpoint: Checkpoint, saved: SavedKey, metas: Mapping[str, Any], notes: Mapping[str, Any]
) -> Any:
    """A number, text or list of an optimizer's state."""
    below = [leaf for leaf in (*metas, *notes) if leaf == saved.leaf or leaf.startswith(f"{saved.leaf}/")]
    tensors = {
        leaf: torch.empty(metas[leaf].shape, dtype=torch_dtype(metas[leaf].dtype)) for leaf in below if leaf in metas
    }
    targets = {
        state_key(saved.fqn, leaf): [Target(tensor=tensor, shard=whole_shard(tensor.shape))]
        for leaf, tensor in tensors.items()
    }
    plan_targets(checkpoint, targets).fill()
    told = {leaf: notes[leaf] for leaf in below if leaf in notes}
    found: Any = restore_state(tensors, told, saved.fqn, lambda leaf, tensor: tensor)
    for part in saved.leaf.split("/"):
        found = found[part]
    return found


class _Reading:
    """What a rank wants of the tensors of a checkpoint.

    Args:
        checkpoint: Where from.
        keys: Of it.
        planner: Gives the memory.
    """

    def __init__(self, checkpoint: Checkpoint, keys: Mapping[str, SavedKey], planner: LoadPlanner) -> None:
        self._checkpoint = checkpoint
        self._keys = keys
        self._planner = planner
        self._of_layers: dict[str, list[Target]] = defaultdict(list)
        self._of_rest: dict[str, list[Target]] = defaultdict(list)
        self._finish: list[Callable[[], None]] = []

    def read(self, items: Sequence[ReadItem]) -> None:
        """Fill what the items ask for."""
        for item in items:
            self._plan(item)
        plan_targets(self._checkpoint, self._of_layers).fill()
        self._read_rest()
        for finish in self._finish:
            finish()

    def _plan(self, item: ReadItem) -> None:
        saved = self._keys[item.storage_index.fqn]
        assert saved.meta is not None
        wanted = self._planner.resolve_tensor(item)
        target = wanted.detach()
        if meta_of(target).dtype != saved.meta.dtype:
            target = torch.empty(tuple(item.lengths), dtype=torch_dtype(saved.meta.dtype))
            self._finish.append(lambda: _cast(target, wanted))
        shard = Shard(shape=saved.meta.shape, offsets=tuple(item.storage_offsets), sizes=tuple(item.lengths))
        of_files = self._of_rest if saved.kind == "rest-tensor" else self._of_layers
        of_files[saved.name].append(Target(tensor=target, shard=shard))
        self._finish.append(lambda: self._planner.commit_tensor(item, wanted))

    def _read_rest(self) -> None:
        """Tensors that are of no layer."""
        files: dict[str, CheckedFile] = {}
        for name in self._of_rest:
            rest = self._keys[name].rest
            assert rest is not None
            files |= {file.record.path: file for file in rest.files}
        read_files(
            [*files.values()],
            lambda file: file.record.bytes,
            lambda file, reader: file.fill(reader, self._of_rest),
        )


def _cast(source: torch.Tensor, target: torch.Tensor) -> None:
    with torch.no_grad():
        target.copy_(source)


def _take_newest(run: Path, look: Callable[[Checkpoint], str | None]) -> Checkpoint | None:
    """The newest checkpoint of a run of which nothing bad is found; on the coordinator.

    Raises:
        IntegrityError: There are checkpoints, and none is good.
        FormatError: A newer program wrote one.
    """
    bad: list[str] = []
    for entry in reversed([entry for entry in list_checkpoints(run) if entry.has_manifest]):
        found, reason = _open_listed(entry.path)
        if found is not None:
            reason = look(found)
            if reason is None:
                return found
        bad.append(f"{entry.path.name}: {reason}")
        warnings.warn(f"{bad[-1]}; it was passed over, and left where it is", QuarantineWarning, stacklevel=2)
    if bad:
        raise IntegrityError(
            "no checkpoint of the run verifies",
            kind="none-verifies",
            path=run,
            found="\n            ".join(bad[:10]),
            hint="llmtailor verify tells what is damaged",
        )
    return None


def _open_listed(path: Path) -> tuple[Checkpoint | None, str | None]:
    """A checkpoint, or what is wrong with its manifest."""
    try:
        return open_checkpoint(path), None
    except FormatError as err:
        if err.kind == "format-version":
            raise
        return None, f"{MANIFEST_NAME}: {err.what}"


def _find_damage(found: Checkpoint, records: Sequence[FileRecord]) -> str | None:
    """What is wrong with some files of a checkpoint: the first fault."""

    def check(record: FileRecord, reader: FileReader) -> str | None:
        path = found.path / record.path
        try:
            with open_published(found.path, record) as descriptor:
                digest = reader.digest(descriptor, record.bytes, path)
            if digest != record.digest:
                raise changed_bytes(path, record.digest, digest)
        except (FormatError, NotFoundError) as err:
            return f"{record.path}: {err.what}"
        return None

    problems = read_files(records, lambda record: record.bytes, check) if records else []
    return next((problem for problem in problems if problem is not None), None)
