"""Saving and loading a DeepSpeed engine through the checkpointer: what every integration of DeepSpeed shares."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import Checkpoint, require_optimizer
from ..errors import FormatError, IncompleteError, UnsupportedError
from ..formats.deepspeed.engine_state import ENGINE_STATE_NAME
from ..load import plan_targets, read_saved_states
from ..local_parts import Seat
from ..manifest import FileRecord
from ..model_state import check_model
from ..optimizer_state import ParameterGroup
from ..state_keys import state_key
from ..state_tree import Note
from ..tensors import TensorMeta
from .filling import ZeroFilling, load_groups
from .live_layers import ZeroReader
from .rest import load_rest, read_rest

__all__ = ["ENGINE_STATE_NAME", "EngineState", "ZeroLoad", "read_engine_state", "write_engine_state"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """What a checkpoint of an engine holds beside layers."""

    engine: Mapping[str, Any]
    """Counters, loss scale and schedules, as ``read_rest`` gives them."""
    client_state: dict[str, Any]
    """The user's own."""
    tag: str | None
    """The name the user saved it by."""


def write_engine_state(
    engine: Any, directory: Path, *, client_state: Mapping[str, Any] | None = None, tag: str | None = None
) -> None:
    """Save counters, loss scale, schedules, and what the user adds; on rank 0.

    Raises:
        UnsupportedError: Something of it could be saved and not be read back: more than tensors, numbers, text and
            containers.
    """
    content = {"engine": read_rest(engine), "client_state": dict(client_state or {}), "tag": tag}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getvalue()
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as err:  # torch and pickle raise a dozen types for what they refuse
        raise UnsupportedError(
            f"the state of the engine could not be read back: {str(err).splitlines()[0]}",
            kind="object-state",
            expected="a client_state, and schedules, of tensors, numbers, text and containers",
            hint="turn other objects into one of these in client_state, and back when it is returned",
        ) from err
    (directory / ENGINE_STATE_NAME).write_bytes(data)


def read_engine_state(checkpoint: Path) -> EngineState:
    """What ``write_engine_state`` saved.

    Raises:
        IncompleteError: No DeepSpeed engine saved the checkpoint.
        FormatError: The file cannot be read.
    """
    path = checkpoint / ENGINE_STATE_NAME
    if not path.is_file():
        raise IncompleteError(
            "the checkpoint was not saved by a DeepSpeed engine",
            kind="other-trainer",
            path=checkpoint,
            expected=ENGINE_STATE_NAME,
            found="none",
            hint="resume it with the trainer that saved it, or have llmtailor export make one of DeepSpeed's",
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return EngineState(engine=content["engine"], client_state=content["client_state"], tag=content["tag"])
    except Exception as err:  # torch raises a dozen types for a file it refuses
        raise FormatError(f"cannot read {path.name}: {err}", kind="bad-object-file", path=path) from err


class ZeroLoad:
    """A checkpoint about to be loaded into an engine; everything was checked that can be without its bytes.

    Args:
        engine: Fresh or not; between two steps.
        checkpoint: Where from; of any world.
        has_optimizer: False loads weights alone; masters are then made of them.

    Raises:
        IncompleteError, IncompatibleError, FormatError, IntegrityError, NotFoundError: It cannot be loaded; nothing was
            changed.
    """

    def __init__(self, engine: Any, checkpoint: Checkpoint, *, has_optimizer: bool = True) -> None:
        manifest = checkpoint.manifest
        # Whose rank it is does not matter to the schema.
        check_model(ZeroReader(engine, seat=Seat()).read_model(engine.module), manifest, path=checkpoint.path)
        metas: dict[str, TensorMeta] = {each.fqn: each.meta for each in manifest.tensors if each.tied_to is None}
        notes: dict[str, Note] = {}
        self.groups: list[ParameterGroup] = []
        if has_optimizer:
            require_optimizer(checkpoint)
            for fqn, saved in read_saved_states(checkpoint).items():
                metas |= {state_key(fqn, leaf): meta for leaf, meta in saved.metas.items()}
                notes |= {state_key(fqn, leaf): note for leaf, note in saved.notes.items()}
            self.groups = [
                ParameterGroup(parameters=group.parameters, options=group.options)
                for optimizer in manifest.optimizers
                for group in optimizer.groups
            ]
        self._engine = engine
        self._filling = ZeroFilling(engine, metas, notes)
        self._load = plan_targets(checkpoint, self._filling.targets)

    def fill(self, on_file: Callable[[FileRecord], None]) -> None:
        """Read this rank's share of the files; a ``resume.Fill``."""
        if self.groups:
            load_groups(self._engine, self.groups)
        self._load.fill(on_file)

    def finish(self, state: EngineState | None, *, with_schedule: bool = True) -> None:
        """Make the engine consistent; on every rank, when all have filled: a collective at stage 3.

        Args:
            state: As ``read_engine_state`` gives it; None leaves counters and schedules alone.
            with_schedule: Load the learning rate schedule, too.
        """
        self._filling.finish()
        if state is not None:
            load_rest(self._engine, state.engine, with_schedule=with_schedule)
