"""A model's parameters and buffers by name: its schema, its live tensors, and putting saved ones back."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import IncompatibleError, UnsupportedError
from .layers import LayerMap, canonical_name, file_stem, map_module, named_tensors
from .local_parts import is_dtensor, memory_of
from .manifest import Manifest, TensorRecord
from .tensor_bytes import meta_of

__all__ = ["ModelReader", "ModelState", "check_model", "find_saved", "is_adapted", "read_model", "refuse_extra_state"]


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
    """True for a model with PEFT's adapters: what is theirs or trains is saved, the base model is not ours to copy.

    Source: peft 0.21, peft_model.py (PeftModel.peft_config, get_base_model); transformers 5.23, integrations/peft.py
        (PeftAdapterMixin.add_adapter, which wraps nothing).
    """
    is_wrapped = hasattr(module, "peft_config") and hasattr(module, "get_base_model")
    return is_wrapped or getattr(module, "_hf_peft_config_loaded", False) is True


def find_saved(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is saved of a model: everything, or of one with adapters what trains and what the adapters hold.

    They hold more than they train: an adapter that is not active, or has a frozen half, and the buffers of modules that
    are saved whole. A new process would draw other numbers for them.

    Args:
        module: The bare model.
        tensors: Its parameters and buffers by canonical name, as ``layers.named_tensors``.

    Returns:
        Of those, the ones to save, in their order; all names of a tied tensor, or none.
    """
    if not is_adapted(module):
        return dict(tensors)
    owned = _adapter_paths(module)
    ids = {id(each) for fqn, each in tensors.items() if _is_trained(each) or not owned.isdisjoint(_prefixes(fqn))}
    return {fqn: each for fqn, each in tensors.items() if id(each) in ids}


def _adapter_paths(module: torch.nn.Module) -> set[str]:
    """Canonical paths of the modules, and names of the tensors, that are an adapter's.

    Source: peft 0.21, tuners/tuners_utils.py (BaseTunerLayer) and utils/other.py (AuxiliaryTrainingWrapper):
        adapter_layer_names, other_param_names; peft_model.py (prompt_encoder).
    """
    paths = {"prompt_encoder"}
    for path, owner in module.named_modules(remove_duplicate=False):
        names = (*getattr(owner, "adapter_layer_names", ()), *getattr(owner, "other_param_names", ()))
        paths |= {canonical_name(f"{path}.{name}" if path else name) for name in names}
    return paths


def _prefixes(fqn: str) -> Iterator[str]:
    parts = fqn.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _is_trained(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad


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
    _refuse_twins(layers)
    records: list[TensorRecord] = []
    tensors: dict[str, torch.Tensor] = {}
    for fqn, tensor in find_saved(module, named_tensors(module)).items():
        tied_to = layers.ties.get(fqn)
        meta = meta_of(tensor)
        records.append(
            TensorRecord(
                fqn=fqn,
                kind="parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer",
                layer=layers.layer_of(fqn).name,
                dtype=meta.dtype,
                shape=meta.shape,
                trainable=_is_trained(tensor),
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


def _refuse_twins(layers: LayerMap) -> None:
    """Names of files that differ in case alone are one file on some file systems."""
    stems: dict[str, str] = {}
    for layer in layers:
        other = stems.setdefault(file_stem(layer).casefold(), layer.name)
        if other != layer.name:
            raise UnsupportedError(
                f"layers {other!r} and {layer.name!r} differ in case alone, and so would their files",
                kind="layer-names",
                layer=layer.name,
                hint='give one of them another name: layer_overrides={"a_name": ["a glob over its parameters"]}',
            )


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
    is_whole = not is_adapted(module)
    saved = set(map(id, find_saved(module, named_tensors(module)).values()))
    for name, owner in module.named_modules():
        if fsdp is not None and isinstance(owner, fsdp.FullyShardedDataParallel):
            raise UnsupportedError(
                "a module is sharded by FSDP1, whose parameters do not say what they are parts of",
                kind="fsdp1",
                fqn=name,
                found=type(owner).__qualname__,
                expected="torch.distributed.fsdp.fully_shard, known as FSDP2",
            )
        # Of a base model that adapters stand on nothing is saved, whatever it keeps.
        if is_whole or any(id(tensor) in saved for tensor in named_tensors(owner).values()):
            refuse_extra_state(name, owner, elsewhere="with Run(..., state={...})")


def refuse_extra_state(name: str, owner: torch.nn.Module, *, elsewhere: str) -> None:
    """Refuse a module that adds something of its own to its ``state_dict``.

    Args:
        name: Of the module.
        owner: It.
        elsewhere: Where that could be saved instead, for the hint.

    Raises:
        UnsupportedError: It does.

    Source: torch 2.13, nn/modules/module.py (get_extra_state, _save_to_state_dict).
    """
    added = "get_extra_state" if type(owner).get_extra_state is not torch.nn.Module.get_extra_state else _added(owner)
    if added is not None:
        raise UnsupportedError(
            "a module keeps extra state that is neither a parameter nor a buffer",
            kind="extra-state",
            fqn=name,
            found=f"{added} of {type(owner).__qualname__}",
            hint=f"make it a persistent buffer, or save it {elsewhere}",
        )


def _added(owner: torch.nn.Module) -> str | None:
    """What a class of its own adds to the ``state_dict``, by way of code of its own; the first of it."""
    kind, stock, found = type(owner), torch.nn.Module, dict[str, object]()
    if kind._save_to_state_dict is not stock._save_to_state_dict:
        owner._save_to_state_dict(found, "", True)
    elif kind.state_dict is not stock.state_dict:
        found |= owner.state_dict(keep_vars=True)
    if not found:
        return None
    # By memory: it may give its tensors other names.
    known = {tensor.data_ptr() for tensor in named_tensors(owner).values() if not is_dtensor(tensor)}
    for key, value in found.items():
        if not isinstance(value, torch.Tensor) or not (is_dtensor(value) or value.data_ptr() in known):
            return key
    return None


def check_model(state: ModelState, saved: Manifest, *, path: object = None) -> None:
    """Refuse a checkpoint of another model before anything is changed.

    Formats that do not tell buffers from parameters leave an imported checkpoint with all of them as parameters: a
    buffer may be one in the checkpoint, as long as no optimizer trained it.

    Raises:
        IncompatibleError: Names, kinds, shapes, element types or ties differ; lists the first few of all.
    """
    trained = {fqn for each in saved.optimizers for group in each.groups for fqn in group.parameters}
    live = {record.fqn: record for record in state.records}
    theirs = {record.fqn: record for record in saved.tensors}
    faults = []
    for fqn in [*live, *(fqn for fqn in theirs if fqn not in live)]:
        ours, other = live.get(fqn), theirs.get(fqn)
        if ours is not None and other is not None and ours.kind == "buffer" and fqn not in trained:
            other = other.model_copy(update={"kind": "buffer"})
        expected, found = _describe(ours), _describe(other)
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
