"""Which layers a save of ``torch.distributed.checkpoint`` writes: a ``SavePlanner``.

    stage      (async_save, all ranks)  TailorWriter.stage -> decide -> what is chosen is copied
    plan       (all ranks)              set_up_planner -> create_local_plan: what this rank writes of chosen layers
               (coordinator)            create_global_plan: what several ranks have of the rest is written by one
    write      (all ranks)              resolve_data

Every rank decides by itself, by what all of them know; the writer compares (``SavePlan.choice``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan as DcpSavePlan
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ...checkpoint import Checkpoint
from ...errors import InvalidInputError, WriteError
from ...local_parts import LocalPart, Seat, local_part
from ...optimizer_state import optimizer_class
from ...save_plan import SavePlan, plan_save
from ...strategies import Full, SaveContext, Strategy, parse_strategy
from .staging import STAGED_KEY, StagedState
from .state_layers import LayerStateReader, NamedState
from .state_names import Names

__all__ = ["LocalSavePlan", "SaveMeta", "TailorPlanner"]


@dataclass
class SaveMeta(StorageMeta):
    """What the writer tells the planner of a save; on all ranks the same but for the seat."""

    step: int = -1
    parent: Checkpoint | None = None
    """The checkpoint that the save follows."""
    can_link: bool = True
    """False after a save that failed: all layers are written."""
    seat: Seat = dataclasses.field(default_factory=Seat)


@dataclass(frozen=True)
class LocalSavePlan(DcpSavePlan):
    """A rank's plan, and what it decided by itself."""

    choice: str = ""
    """See ``SavePlan.choice``."""
    parent: str | None = None
    """Digest of the checkpoint that it follows."""
    step: int = -1


class TailorPlanner(DefaultSavePlanner):
    """Has ``dcp.save`` and ``dcp.async_save`` write the layers that a strategy chooses; the others are linked.

    Goes with ``TailorWriter``. Called on all ranks, which must make it alike and save the same state. What is neither
    a tensor of the model nor its optimizer's state is always written. Plans are not cached: they differ from save to
    save.

    Args:
        strategy: Which layers a save writes: text, object, or a callable.
        model: The bare module, where it is at hand. A state dict says neither which tensors are buffers nor which
            train; with the module the checkpoint does, and ``Run`` can load it.
        optimizers: The optimizer that the state dict is of, likewise; a state dict does not say its class.
        model_key: Where in the state dict the model is, as dotted keys; found out if None.
        optimizer_key: Where its optimizer is.
        split_experts: Every expert of a block is a layer of its own.
        layer_overrides: Layers of your own: name -> globs over parameter names.

    Raises:
        InvalidInputError: An unknown strategy.
    """

    def __init__(
        self,
        strategy: str | Strategy | Callable[[SaveContext], Collection[str]] = "full",
        *,
        model: torch.nn.Module | None = None,
        optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
        model_key: str | None = None,
        optimizer_key: str | None = None,
        split_experts: bool = False,
        layer_overrides: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(dedup_save_to_lowest_rank=True, enable_plan_caching=False)
        self._strategy = parse_strategy(strategy)
        known = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        self._reader = LayerStateReader(
            model=model,
            optimizers=[optimizer_class(each) for each in known],
            names=Names(model=model_key, optimizer=optimizer_key),
            split_experts=split_experts,
            overrides=layer_overrides,
        )
        self._named: NamedState | None = None
        self._is_staged = False
        self._save_plan: SavePlan | None = None
        self._meta = SaveMeta()
        self._rest: dict[str, object] = {}
        self._names: dict[str, str] = {}
        """Key -> name in a layer file, of tensors."""

    # ---- What the writer asks ----

    def read(self, state_dict: Mapping[str, Any]) -> NamedState:
        """Understand a state dict; see ``LayerStateReader.read``."""
        return self._reader.read(state_dict)

    def decide(self, named: NamedState, meta: SaveMeta) -> SavePlan:
        """Choose layers; the same on every rank.

        Raises:
            InvalidInputError: The strategy names no layer.
        """
        plan = plan_save(
            named.live,
            step=meta.step,
            contents="full" if named.live.optimizers else "weights",
            strategy=self._strategy if meta.can_link else Full(),
            rest=None,
            parent=None if meta.parent is None else meta.parent.manifest,
            # Not looked at here, for not all ranks would see the same: a file that is gone fails the save.
            is_linkable=lambda layer, files: True,
            seat=meta.seat,
        )
        is_whole = not any(named.is_in_parts(layer.name, of_state=False) for layer in named.live.layers)
        return replace(plan, has_whole_weights=is_whole)

    @property
    def named(self) -> NamedState:
        """The state that is being saved."""
        assert self._named is not None
        return self._named

    @property
    def save_plan(self) -> SavePlan:
        """What is being saved of it."""
        assert self._save_plan is not None
        return self._save_plan

    @property
    def staged(self) -> NamedState | None:
        """The same, if it is a copy that was made for this save; None if it is live."""
        return self._named if self._is_staged else None

    def rest_part(self, key: str) -> LocalPart:
        """What of a tensor that is of no layer is on this rank."""
        value = self._rest[key]
        assert isinstance(value, torch.Tensor)
        return local_part(value)

    def forget(self) -> None:
        """Let go of the state, which is written."""
        self._named = self._save_plan = None
        self._rest = {}

    # ---- What DCP asks ----

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Understand the state and decide; on all ranks.

        Raises:
            InvalidInputError: The writer is not ours; or the state was staged for another step.
            WriteError: The state was staged to follow another checkpoint.
            IncompatibleError, UnsupportedError: The state cannot be saved.
        """
        if not isinstance(storage_meta, SaveMeta):
            raise InvalidInputError(
                "TailorPlanner plans for TailorWriter alone",
                kind="dcp-objects",
                expected="storage_writer=TailorWriter(...)",
            )
        self._meta, self.is_coordinator = storage_meta, is_coordinator
        staged = state_dict.get(STAGED_KEY)
        self._is_staged = isinstance(staged, StagedState)
        if isinstance(staged, StagedState):
            _check_staged(staged, storage_meta)
            self._named = staged.named
        else:
            self._named = self.read(state_dict)
        decided = staged.plan if isinstance(staged, StagedState) else None
        self._save_plan = decided or self.decide(self._named, storage_meta)
        self._rest = {entry.key: entry.value for entry in self._named.entries if entry.role == "rest"}
        self._names = {part.key: name for name, part in self._named.parts.items() if name not in self._named.notes}
        self.state_dict = self._rest
        self.mappings = {entry.key: entry.path for entry in self._named.entries}

    def create_local_plan(self) -> DcpSavePlan:
        """What this rank has to write; on all ranks."""
        named, plan, meta = self.named, self.save_plan, self._meta
        chosen = frozenset(choice.layer for choice in plan.choices if choice.layer not in plan.kept)
        written = named.written_by(meta.seat, chosen)
        # A number is in its layer's file; to DCP it is bytes, once for each key.
        values = dict.fromkeys(named.parts[name].key for name in written if name in named.notes)
        items = [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in values]
        items += [
            _tensor_item(named.parts[name].key, named.parts[name].local) for name in written if name not in named.notes
        ]
        for key, value in self._rest.items():
            items += _rest_items(key, value)
        self.plan = LocalSavePlan(
            items=items,
            planner_data=self.mappings,
            choice=plan.choice,
            parent=None if meta.parent is None else meta.parent.digest,
            step=plan.step,
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The part of a tensor that is here, or another value."""
        key = index.fqn
        if key in self._rest:
            value = self._rest[key]
            return local_part(value).tensor if isinstance(value, torch.Tensor) else value
        return self.named.parts[self._names[key]].local.tensor


def _check_staged(staged: StagedState, meta: SaveMeta) -> None:
    if staged.plan is None:
        return
    if staged.plan.step != meta.step:
        raise InvalidInputError(
            "the state was staged for another step",
            kind="staged-step",
            expected=f"step {staged.plan.step}, as TailorWriter.step was",
            found=f"step {meta.step}, as checkpoint_id says",
            hint="set TailorWriter.step before async_save, or leave it to checkpoint_id alone",
        )
    parent = None if meta.parent is None else meta.parent.digest
    if staged.parent != parent:
        raise WriteError(
            "a checkpoint was published after this one's state was staged",
            kind="parent-failed",
            expected="one save at a time",
            hint="wait for the future of one async_save before the next",
        )


def _tensor_item(key: str, local: LocalPart) -> WriteItem:
    shard = local.shard
    return WriteItem(
        index=MetadataIndex(key, shard.offsets),
        type=WriteItemType.SHARD if local.is_sharded else WriteItemType.TENSOR,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=torch.Size(shard.offsets), sizes=torch.Size(shard.sizes)),
            properties=TensorProperties(dtype=local.tensor.dtype),
            size=torch.Size(shard.shape),
        ),
    )


def _rest_items(key: str, value: object) -> list[WriteItem]:
    if not isinstance(value, torch.Tensor):
        return [WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO)]
    local = local_part(value)
    return [_tensor_item(key, local)] if local.shard.numel or not local.is_sharded else []
