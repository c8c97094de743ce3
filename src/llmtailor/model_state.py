"""A model's parameters and buffers by name: its schema, its live tensors, and putting saved ones back."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import IncompatibleError, UnsupportedError
from .layers import LayerMap, map_module, named_tensors
from .local_parts import is_dtensor, memory_of
from .manifest import TensorRecord
from .tensor_bytes import meta_of

__all__ = ["ModelReader", "ModelState", "check_model", "is_adapted", "read_model", "refuse_extra_state"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """What of a model is saved."""

    layers: LayerMap
    records: tuple[TensorRecord, ...]
    """The schema, in model order; tied names included."""
    tensors: Mapping[str, torch.Tensor]
    """fqn -> the live tensor (no copy), which may be a ``DTensor``; tied names left out."""

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """fqn and parameter, ties left out, in model order."""
        for fqn, tensor in self.tensors.items():
            if isinstance(tensor, torch.nn.Parameter):
                yield fqn, tensor


def is_adapted(module: torch.nn.Module) -> bool:
    """True for a model wrapped by PEFT: only what it trains is saved, the base model is not ours to copy.

    Source: peft 0.21, peft_model.py (PeftModel.peft_config, get_base_model).
    """
    return hasattr(module, "peft_config") and hasattr(module, "get_base_model")


def read_model(
    module: torch.nn.Module, *, split_experts: bool = False, overrides: Mapping[str, Sequence[str]] | None = None
) -> ModelState:
    """Read the schema and the live tensors of a model; copies nothing.

    What FSDP2 has left gathered after a forward is let go of, as by its ``state_dict``: the optimizer knows the shards.

    Args:
        module: The bare model (unwrapped from DistributedDataParallel); ``torch.compile`` wrappers are seen through.
        split_experts: As in ``layers.map_module``.
        overrides: As in ``layers.map_module``.

    Raises:
        UnsupportedError: A tensor is neither plain and dense (but a subclass, sparse, on the meta device) nor a
            ``DTensor`` of such parts; a module has ``get_extra_state``, or is FSDP1's; or there is nothing to save.
    """
    _reshard(module)
    _refuse_modules(module)
    layers = map_module(module, split_experts=split_experts, overrides=overrides)
    trained_only = is_adapted(module)
    records: list[TensorRecord] = []
    tensors: dict[str, torch.Tensor] = {}
    for fqn, tensor in named_tensors(module).items():
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        if trained_only and not (is_parameter and tensor.requires_grad):
            continue
        tied_to = layers.ties.get(fqn)
        meta = meta_of(tensor)
        records.append(
            TensorRecord(
                fqn=fqn,
                kind="parameter" if is_parameter else "buffer",
                layer=layers.layer_of(fqn).name,
                dtype=meta.dtype,
                shape=meta.shape,
                trainable=is_parameter and tensor.requires_grad,
                tied_to=tied_to,
            )
        )
        if tied_to is None:
            tensors[fqn] = tensor
    if not tensors:
        raise UnsupportedError(
            "the model has nothing to save",
            kind="empty-model",
            found="no parameter that trains",
            expected="one or more",
        )
    return ModelState(layers=layers, records=tuple(records), tensors=tensors)


class ModelReader:
    """Reads one model again and again: anew only if a module, a tensor or what kind it is has changed.

    Args:
        split_experts: As in ``layers.map_module``.
        overrides: As in ``layers.map_module``.
    """

    def __init__(self, *, split_experts: bool = False, overrides: Mapping[str, Sequence[str]] | None = None) -> None:
        self._split_experts = split_experts
        self._overrides = overrides
        self._modules: list[object] = []
        self._tensors: list[object] = []
        self._state: ModelState | None = None

    def read(self, module: torch.nn.Module) -> ModelState:
        """As ``read_model``; the same object as long as nothing changed."""
        _reshard(module)
        modules, tensors = _fingerprint(module)
        if self._state is None or modules != self._modules or tensors != self._tensors:
            self._state = read_model(module, split_experts=self._split_experts, overrides=self._overrides)
            self._modules, self._tensors = modules, tensors
        return self._state


def _fingerprint(module: torch.nn.Module) -> tuple[list[object], list[object]]:
    """What says whether a model is the one it was; a tenth of the time that it takes to read it.

    By identity: whoever keeps the state that was read keeps the tensors alive, so no other can have the id of one.
    """
    modules: list[object] = []
    tensors: list[object] = []
    rest = [module]
    while rest:
        owner = rest.pop()
        children, parameters, buffers = owner._modules, owner._parameters, owner._buffers
        modules.append((id(owner), *children, *parameters, *buffers, *owner._non_persistent_buffers_set))
        rest += [child for child in children.values() if child is not None]
        for tensor in (*parameters.values(), *buffers.values()):
            if tensor is not None:
                tensors.append((id(tensor), tensor.shape, tensor.dtype, tensor.requires_grad))
                if is_dtensor(tensor):
                    tensors.append((memory_of(tensor).shape, tensor.placements))  # type: ignore[attr-defined]
    return modules, tensors


def _reshard(module: torch.nn.Module) -> None:
    """Have FSDP2 put its sharded parameters back where it left gathered ones.

    Source: torch 2.13, distributed/fsdp/_fully_shard/_fully_shard.py (FSDPModule.reshard; the root, and what was told
        so, stays gathered after a forward), _fsdp_param_group.py (_register_state_dict_hooks).
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # whoever shards has imported it
    if fsdp is not None:
        for owner in module.modules():
            if isinstance(owner, fsdp.FSDPModule):
                owner.reshard()


def _refuse_modules(module: torch.nn.Module) -> None:
    """Source: torch 2.13, nn/modules/module.py (get_extra_state): what a module adds to its ``state_dict``."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for name, owner in module.named_modules():
        if fsdp is not None and isinstance(owner, fsdp.FullyShardedDataParallel):
            raise UnsupportedError(
                "a module is sharded by FSDP1, whose parameters do not say what they are parts of",
                kind="fsdp1",
                fqn=name,
                found=type(owner).__qualname__,
                expected="torch.distributed.fsdp.fully_shard, known as FSDP2",
            )
        refuse_extra_state(name, owner, elsewhere="with Run(..., state={...})")


def refuse_extra_state(name: str, owner: torch.nn.Module, *, elsewhere: str) -> None:
    """Refuse a module that adds something of its own to its ``state_dict``.

    Args:
        name: Of the module.
        owner: It.
        elsewhere: Where that could be saved instead, for the hint.

    Raises:
        UnsupportedError: It does.

    Source: torch 2.13, nn/modules/module.py (get_extra_state).
    """
    if type(owner).get_extra_state is not torch.nn.Module.get_extra_state:
        raise UnsupportedError(
            "a module keeps extra state that is neither a parameter nor a buffer",
            kind="extra-state",
            fqn=name,
            found=type(owner).__qualname__,
            hint=f"make it a persistent buffer, or save it {elsewhere}",
        )


def check_model(state: ModelState, saved: Iterable[TensorRecord], *, path: object = None) -> None:
    """Refuse a checkpoint of another model before anything is changed.

    Raises:
        IncompatibleError: Names, shapes, element types or ties differ; lists the first few of all.
    """
    live = {record.fqn: record for record in state.records}
    theirs = {record.fqn: record for record in saved}
    faults = []
    for fqn in [*live, *(fqn for fqn in theirs if fqn not in live)]:
        expected, found = (_describe(records.get(fqn)) for records in (live, theirs))
        if expected != found:
            faults.append((fqn, expected, found))
    if faults:
        fqn, expected, found = faults[0]
        more = "".join(f"\n            {name}: model {ours}, checkpoint {other}" for name, ours, other in faults[1:6])
        raise IncompatibleError(
            f"the checkpoint is of another model: {len(faults)} of {len(live)} tensors differ",
            kind="other-model",
            path=None if path is None else str(path),
            fqn=fqn,
            expected=f"{expected}, as in the model",
            found=f"{found}, in the checkpoint{more}",
            hint="load it into the model it was saved from, with the same dtype; or give another run directory",
        )


def _describe(record: TensorRecord | None) -> str:
    if record is None:
        return "no such tensor"
    return f"{record.kind} {record.meta}" + (f" tied to {record.tied_to}" if record.tied_to else "")
