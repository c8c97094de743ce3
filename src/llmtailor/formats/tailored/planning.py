"""A checkpoint of our own, planned from a catalog: a file per layer and kind, links where a file can stay as it is."""

from __future__ import annotations

import json
import os
import platform
import socket
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from ... import __version__
from ...catalog import Catalog, StateRef, join_masters, weights_to_train
from ...errors import IncompatibleError, UnsupportedError
from ...file_plan import CheckpointPlan, FilePlan, FileRange, LinkPlan, Part, WrittenFile
from ...layers import Layer, file_stem
from ...manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    FileRecord,
    GroupRecord,
    LayerRecord,
    Manifest,
    OptimizerRecord,
    TensorRecord,
    World,
    Writer,
    encode_manifest,
)
from ...state_keys import NOTES_KEY, state_key
from ...tensor_refs import FileTensor, TensorRef, files_of, whole
from ...tensors import ByteRange
from ..safetensors import Layout, plan_layout

__all__ = ["plan_tailored"]

_REASON = "merge"
# Leaves that tell torch's Adam from its other optimizers, where a format keeps no class.
_ADAM_LEAVES = frozenset({"exp_avg", "exp_avg_sq"})


@dataclass(frozen=True, slots=True, kw_only=True)
class _LayerFiles:
    """Names of a layer's files in the new checkpoint."""

    weights: str
    optimizer: str | None


def plan_tailored(catalog: Catalog, *, dtype: str | None = None) -> CheckpointPlan:
    """Plan a checkpoint of our own.

    Where the optimizer keeps fp32 masters beside the weights, the masters become the weights: they are what training
    in one process goes on with. Masters that are a part of its state stay one.

    Args:
        catalog: Of any source; its ``update_counts`` must know each layer that counts updates.
        dtype: Element type of the weights, safetensors spelling; None keeps each as it is.

    Raises:
        IncompatibleError: A layer was saved after the step of the checkpoint.
        UnsupportedError: The class of the optimizer is not known.
    """
    weights, notes = weights_to_train(catalog, dtype, keeps_leaves=True)
    catalog = join_masters(catalog)
    files: list[FilePlan] = []
    links: list[LinkPlan] = []
    of_layer: dict[str, _LayerFiles] = {}
    for layer in catalog.layers:
        stem = file_stem(layer)
        held = {fqn: weights[fqn] for fqn in layer.fqns}
        names = [f"model-{stem}.safetensors"]
        _add(names[0], held, {}, catalog, files, links)
        tensors, about = _state_content({fqn: catalog.states[fqn] for fqn in layer.fqns if fqn in catalog.states})
        if tensors or about:
            names.append(f"optimizer/{stem}.safetensors")
            metadata_of = {NOTES_KEY: json.dumps(dict(sorted(about.items())))} if about else {}
            _add(names[1], tensors, metadata_of, catalog, files, links)
        of_layer[layer.name] = _LayerFiles(weights=names[0], optimizer=names[1] if len(names) == 2 else None)
    files.append(FilePlan(name=INDEX_NAME, parts=(_encode_index(weights, catalog.layers.layers),)))
    small = [file for file in catalog.files if file.name not in (INDEX_NAME, MANIFEST_NAME)]
    for file in small:
        parts = (FileRange(path=file.path, byte_range=ByteRange(start=0, end=file.nbytes)),)
        files.append(FilePlan(name=file.name, parts=parts))
    draft = _Draft(catalog, weights, of_layer)
    draft.check()
    return CheckpointPlan(files=tuple(files), links=tuple(links), seal=draft.seal, notes=notes)


def _state_content(states: Mapping[str, StateRef]) -> tuple[dict[str, TensorRef], dict[str, object]]:
    tensors = {state_key(fqn, leaf): ref for fqn, state in states.items() for leaf, ref in state.tensors.items()}
    notes = {state_key(fqn, leaf): note for fqn, state in states.items() for leaf, note in state.notes.items()}
    return tensors, dict(notes)


def _add(
    name: str,
    tensors: Mapping[str, TensorRef],
    metadata_of: Mapping[str, str],
    catalog: Catalog,
    files: list[FilePlan],
    links: list[LinkPlan],
) -> None:
    """Plan one layer file: as a link if a published file is the same, else as a new one."""
    layout = plan_layout([(key, ref.meta) for key, ref in tensors.items()], {"format": "pt", **metadata_of})
    source = _single_file(tensors)
    record = None if source is None else catalog.published.get(source)
    if source is not None and record is not None and _is_same_file(layout, tensors, record):
        links.append(LinkPlan(name=name, source=source, nbytes=record.bytes, digest=record.digest))
    else:
        parts: tuple[Part, ...] = (layout.prefix, *(whole(tensors[stored.name]) for stored in layout.tensors))
        files.append(FilePlan(name=name, parts=parts))


def _single_file(tensors: Mapping[str, TensorRef]) -> Path | None:
    """The file that all the tensors lie in, if there is one."""
    paths = {path for ref in tensors.values() for path in files_of(ref)}
    return paths.pop() if len(paths) == 1 else None


def _is_same_file(layout: Layout, tensors: Mapping[str, TensorRef], record: FileRecord) -> bool:
    """Whether a published file holds exactly these tensors at exactly these places.

    The layout depends on names, types, shapes and metadata alone, so equal places and size mean equal content, but
    for the digest, which goes along.
    """
    return record.bytes == layout.nbytes and all(
        isinstance(ref, FileTensor) and [extent.offset for extent in ref.extents] in ([], [stored.byte_range.start])
        for stored in layout.tensors
        for ref in (tensors[stored.name],)
    )


def _encode_index(weights: Mapping[str, TensorRef], layers: Sequence[Layer]) -> bytes:
    """Source: transformers 5.23, modeling_utils.py (save_pretrained; keys ``metadata.total_size``, ``weight_map``)."""
    weight_map = {fqn: f"model-{file_stem(layer)}.safetensors" for layer in layers for fqn in layer.fqns}
    total = sum(ref.meta.nbytes for ref in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


@dataclass(frozen=True, slots=True)
class _Draft:
    """The manifest, but for the files' digests."""

    catalog: Catalog
    weights: Mapping[str, TensorRef]
    files: Mapping[str, _LayerFiles]
    """Layer -> its files."""

    def check(self) -> None:
        """Raise now what would be raised when everything is written."""
        step = self._step
        late = {layer: at for layer, at in self.catalog.layer_steps.items() if at > step}
        if late:
            listed = ", ".join(f"{layer} at {at}" for layer, at in sorted(late.items())[:8])
            raise IncompatibleError(
                "layers were saved after the step of the checkpoint they are merged into",
                kind="layer-newer",
                path=self.catalog.path,
                expected=f"layers saved at or before step {step}, which state_from is of",
                found=listed,
                hint="set state_from to the newest source",
            )
        self._optimizers()

    @property
    def _step(self) -> int:
        """Of the source; if it does not say, as many steps as its most updated layer got updates."""
        if self.catalog.step is not None:
            return self.catalog.step
        return max((count for count in self.catalog.update_counts.values() if count is not None), default=0)

    @property
    def _world(self) -> World:
        """Tensors are whole; random numbers and data positions are still those of each rank of the source."""
        source = self.catalog.native if self.catalog.has_optimizer else None
        return World(size=source.world.size if isinstance(source, Manifest) else 1, sharding="none")

    def seal(self, written: Mapping[str, WrittenFile]) -> FilePlan:
        """The manifest, from all the other files."""
        records = {
            name: FileRecord(path=name, bytes=file.nbytes, digest=file.digest or "") for name, file in written.items()
        }
        of_layers = {name for files in self.files.values() for name in (files.weights, files.optimizer) if name}
        catalog = self.catalog
        save_index = catalog.native.save_index if isinstance(catalog.native, Manifest) else 0
        manifest = Manifest(
            run_id=uuid.uuid4().hex,
            step=self._step,
            save_index=save_index,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            parent=None,
            contents="full" if catalog.has_optimizer else "weights",
            strategy="merge()",
            world=self._world,
            writer=_writer(),
            tensors=tuple(self._tensors()),
            optimizers=self._optimizers(),
            layers=tuple(self._layer(layer, records, save_index) for layer in catalog.layers),
            files=tuple(record for name, record in sorted(records.items()) if name not in of_layers),
        )
        return FilePlan(name=MANIFEST_NAME, parts=(encode_manifest(manifest)[0],))

    def _layer(self, layer: Layer, records: Mapping[str, FileRecord], save_index: int) -> LayerRecord:
        files = self.files[layer.name]
        return LayerRecord(
            name=layer.name,
            kind=layer.kind.value,
            stack=layer.stack,
            index=layer.index,
            step=self._step if (saved := self.catalog.step_of(layer.name)) is None else saved,
            save_index=save_index,
            update_count=None if files.optimizer is None else self.catalog.update_counts.get(layer.name),
            reason=_REASON,
            drift=None,
            weights=records[files.weights],
            optimizer=None if files.optimizer is None else records[files.optimizer],
        )

    def _tensors(self) -> Iterator[TensorRecord]:
        catalog = self.catalog
        trained = {fqn for each in catalog.optimizers for group in each.groups for fqn in group.parameters}
        later = defaultdict(list)
        for name, first in catalog.ties.items():
            later[first].append(name)
        for fqn, ref in self.weights.items():
            is_buffer = fqn in catalog.buffers
            record = TensorRecord(
                fqn=fqn,
                kind="buffer" if is_buffer else "parameter",
                layer=catalog.layers.layer_of(fqn).name,
                dtype=ref.meta.dtype,
                shape=ref.meta.shape,
                trainable=not is_buffer and (fqn in trained or not trained),
                tied_to=None,
            )
            yield record
            for name in later[fqn]:
                yield record.model_copy(update={"fqn": name, "tied_to": fqn})

    def _optimizers(self) -> tuple[OptimizerRecord, ...]:
        return tuple(
            OptimizerRecord.model_validate(
                {
                    "class": optimizer.name or self._guess_class(),
                    "groups": tuple(
                        GroupRecord(parameters=each.parameters, options=dict(each.options)) for each in optimizer.groups
                    ),
                }
            )
            for optimizer in self.catalog.optimizers
        )

    def _guess_class(self) -> str:
        """The class of an optimizer whose checkpoint does not name it.

        Source: torch 2.13, optim/adam.py: Adam and AdamW write ``decoupled_weight_decay`` into each group.
        """
        groups = [group for optimizer in self.catalog.optimizers for group in optimizer.groups]
        leaves = {leaf for state in self.catalog.states.values() for leaf in state.tensors}
        if len(self.catalog.optimizers) == 1 and leaves >= _ADAM_LEAVES:
            decoupled = {group.options.get("decoupled_weight_decay") for group in groups}
            if decoupled == {True}:
                return "torch.optim.adamw.AdamW"
            if decoupled == {False}:
                return "torch.optim.adam.Adam"
        raise UnsupportedError(
            "the source does not say which optimizer its state is of, and it does not look like torch's Adam or AdamW",
            kind="optimizer-class",
            path=self.catalog.path,
            expected="a group option decoupled_weight_decay, and state exp_avg and exp_avg_sq",
            found=f"state {', '.join(sorted(leaves)[:8]) or 'of no parameter'}",
            hint="write it in the format of its source, or with --weights-only",
        )


def _writer() -> Writer:
    return Writer(
        llmtailor=__version__,
        torch=metadata.version("torch"),
        python=platform.python_version(),
        host=socket.gethostname(),
        pid=os.getpid(),
    )
