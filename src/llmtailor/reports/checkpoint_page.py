"""Everything a manifest says about its checkpoint, on one page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..checkpoint import Checkpoint
from ..manifest import (
    EncodingRecord,
    FileRecord,
    LayerRecord,
    Manifest,
    OptimizerRecord,
    PartRecord,
    SaveRecord,
    TensorRecord,
)
from .units import format_bytes, format_number_of

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["CheckpointPage"]

_COMPONENTS: tuple[Literal["weights", "first", "second"], ...] = ("weights", "first", "second")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPage:
    """What ``llmtailor show`` shows."""

    checkpoint: Checkpoint
    has_tensors: bool = False
    """List the tensors too."""

    def names(self) -> list[str]:
        """Path of the checkpoint."""
        return [str(self.checkpoint.path)]

    def record(self) -> dict[str, Any]:
        manifest = self.checkpoint.manifest
        record = {
            "path": str(self.checkpoint.path),
            "digest": self.checkpoint.digest,
            **manifest.model_dump(
                mode="json", include={"format_version", "run_id", "step", "save_index", "created", "parent", "contents"}
            ),
            "strategy": manifest.strategy,
            "is_consistent": manifest.is_consistent,
            "is_current": manifest.is_current,
            "world": manifest.world.model_dump(mode="json"),
            "writer": manifest.writer.model_dump(mode="json"),
            "save": None if manifest.save is None else manifest.save.model_dump(mode="json"),
            "num_parameters": _count_parameters(manifest),
            "num_trainable": _count_parameters(manifest, only_trainable=True),
            "tied": _ties(manifest),
            "bytes": manifest.nbytes,
            "written_bytes": manifest.written_nbytes,
            "weights_bytes": sum(_nbytes(layer.weights_files) for layer in manifest.layers),
            "optimizer_bytes": sum(_optimizer_nbytes(layer) or 0 for layer in manifest.layers),
            "codes_bytes": sum(_codes_nbytes(layer) or 0 for layer in manifest.layers),
            "layers": [_layer_record(layer, manifest.step) for layer in manifest.layers],
            "optimizers": [each.model_dump(mode="json", by_alias=True) for each in manifest.optimizers],
            "files": [each.model_dump(mode="json") for each in manifest.files],
        }
        if self.has_tensors:
            record["tensors"] = [each.model_dump(mode="json") for each in manifest.tensors]
        return record

    def tables(self) -> Iterator[RenderableType]:
        from .tables import facts_table, heading, line

        manifest = self.checkpoint.manifest
        yield line(str(self.checkpoint.path), "bold")
        yield facts_table(_facts(manifest))
        yield heading(format_number_of(len(manifest.layers), "layer"))
        yield _layer_table(manifest)
        coded = [(layer, layer.encoding) for layer in manifest.layers if layer.encoding is not None]
        if coded:
            yield heading(f"{format_number_of(len(coded), 'layer')} as codes")
            yield _codes_table(coded)
        for optimizer in manifest.optimizers:
            yield heading(f"optimizer {optimizer.name}")
            yield facts_table(_group_facts(optimizer))
        if manifest.files:
            yield heading(format_number_of(len(manifest.files), "small file"))
            yield facts_table((file.path, format_bytes(file.bytes)) for file in manifest.files)
        if self.has_tensors:
            yield heading(format_number_of(len(manifest.tensors), "tensor"))
            yield _tensor_table(manifest.tensors)


def _count_parameters(manifest: Manifest, *, only_trainable: bool = False) -> int:
    """Elements of all parameters, tied ones once."""
    return sum(
        tensor.meta.numel
        for tensor in manifest.tensors
        if tensor.kind == "parameter" and tensor.tied_to is None and (tensor.trainable or not only_trainable)
    )


def _ties(manifest: Manifest) -> dict[str, str]:
    return {tensor.fqn: tensor.tied_to for tensor in manifest.tensors if tensor.tied_to is not None}


def _nbytes(files: Iterable[FileRecord]) -> int:
    return sum(file.bytes for file in files)


def _optimizer_nbytes(layer: LayerRecord) -> int | None:
    return _nbytes(layer.optimizer_files) if layer.optimizer_files else None


def _codes_nbytes(layer: LayerRecord) -> int | None:
    return None if layer.encoding is None else layer.encoding.codes.bytes


def _layer_record(layer: LayerRecord, step: int) -> dict[str, Any]:
    return {
        **layer.model_dump(mode="json", exclude={"weights", "optimizer", "parts"}),
        "state_step": layer.state_step,
        "state_update_count": layer.state_update_count,
        "staleness": step - layer.state_step,
        "weights_bytes": _nbytes(layer.weights_files),
        "optimizer_bytes": _optimizer_nbytes(layer),
        "codes_bytes": _codes_nbytes(layer),
        "num_ranks": len(layer.parts),
        "parts": [_part_record(part) for part in layer.parts],
        "weights_path": None if layer.weights is None else layer.weights.path,
        "optimizer_path": None if layer.optimizer is None else layer.optimizer.path,
    }


def _part_record(part: PartRecord) -> dict[str, Any]:
    return {
        "rank": part.rank,
        "weights_bytes": None if part.weights is None else part.weights.bytes,
        "optimizer_bytes": None if part.optimizer is None else part.optimizer.bytes,
        "weights_path": None if part.weights is None else part.weights.path,
        "optimizer_path": None if part.optimizer is None else part.optimizer.path,
    }


def _facts(manifest: Manifest) -> Iterator[tuple[str, object]]:
    writer, parent = manifest.writer, manifest.parent
    trainable = _count_parameters(manifest, only_trainable=True)
    yield "step", manifest.step
    yield "created", f"{manifest.created[:19].replace('T', ' ')} UTC"
    yield "run", f"{manifest.run_id}, save {manifest.save_index + 1}"
    yield "parent", "none, the first of its run" if parent is None else f"step {parent.step}"
    yield "strategy", manifest.strategy
    yield "consistent", "yes" if manifest.is_consistent else f"no, {_describe_inconsistency(manifest)}"
    yield "contents", "weights and optimizer" if manifest.contents == "full" else "weights only; not resumable"
    yield "parameters", f"{_count_parameters(manifest):,}, {trainable:,} of them trainable"
    yield "tied", "; ".join(f"{fqn} is {holder}" for fqn, holder in _ties(manifest).items()) or None
    yield "files", f"{len(manifest.all_files)}, {format_bytes(manifest.nbytes)}"
    yield "written", f"{format_bytes(manifest.written_nbytes)} of that by this save"
    yield "cost", None if manifest.save is None else _describe_cost(manifest.save)
    yield "writer", f"llmtailor {writer.llmtailor}, torch {writer.torch}, Python {writer.python}"
    yield "host", f"{writer.host}, process {writer.pid}"
    yield "world", _describe_world(manifest)


def _describe_world(manifest: Manifest) -> str:
    if manifest.world.size == 1:
        return "1 rank"
    num_parts = sum(bool(layer.parts) for layer in manifest.layers)
    number = format_number_of(num_parts, "layer")
    cut = f"{number} in parts of several" if num_parts else "every layer in whole files"
    return f"{manifest.world.size} ranks, {cut}"


def _describe_inconsistency(manifest: Manifest) -> str:
    staleness = manifest.staleness
    num_coded = sum(layer.encoding is not None for layer in manifest.layers)
    age = f"the oldest layer is {format_number_of(staleness, 'step')} behind" if staleness else "nothing is stale"
    if not num_coded:
        return age
    return f"{format_number_of(num_coded, 'layer')} {'is' if num_coded == 1 else 'are'} codes, {age}"


def _describe_cost(save: SaveRecord) -> str:
    return (
        f"training held up {save.stall_secs * 1e3:.0f} ms, captured in {save.capture_secs:.2f} s, "
        f"written in {save.write_secs:.2f} s more, {format_bytes(save.pool_bytes)} of host memory"
    )


def _layer_table(manifest: Manifest) -> Table:
    from .tables import cell, plain_table

    has_drift = any(layer.drift is not None for layer in manifest.layers)
    has_parts = any(layer.parts for layer in manifest.layers)
    columns = ("  layer", "kind", ">step", ">stale", ">updates", ">weights", ">optimizer")
    table = plain_table(*columns, *([">ranks"] if has_parts else []), "reason", *([">drift"] if has_drift else []))
    for layer in manifest.layers:
        optimizer = _optimizer_nbytes(layer)
        row = [
            cell(f"  {layer.name}"),
            cell(layer.kind),
            cell(layer.state_step),
            cell(manifest.step - layer.state_step),
            cell(layer.state_update_count),
            cell(format_bytes(_nbytes(layer.weights_files))),
            cell(None if optimizer is None else format_bytes(optimizer)),
            *([cell(len(layer.parts) or None)] if has_parts else []),
            cell(layer.reason),
        ]
        table.add_row(*row, *([cell(None if layer.drift is None else f"{layer.drift:.4g}")] if has_drift else []))
    weights = sum(_nbytes(layer.weights_files) for layer in manifest.layers)
    state = sum(_optimizer_nbytes(layer) or 0 for layer in manifest.layers)
    total = ("  total", "", "", "", "", format_bytes(weights), format_bytes(state))
    table.add_row(*map(cell, total), style="bold")
    return table


def _codes_table(coded: list[tuple[LayerRecord, EncodingRecord]]) -> Table:
    """A table of its own: its columns beside those of all layers would be wider than a terminal."""
    from .tables import cell, plain_table

    errors = (f">err {name}" for name in _COMPONENTS)
    table = plain_table("  layer", "codes", ">size", ">exact of", *errors)
    for layer, encoding in coded:
        row = (
            f"  {layer.name}",
            encoding.rest,
            format_bytes(encoding.codes.bytes),
            layer.step if encoding.base == "exact" else None,
            *(f"{encoding.errors[name].l2:.2g}" if name in encoding.errors else "0" for name in _COMPONENTS),
        )
        table.add_row(*map(cell, row))
    total = ("  total", "", format_bytes(sum(encoding.codes.bytes for _, encoding in coded)))
    table.add_row(*map(cell, total), style="bold")
    return table


def _group_facts(optimizer: OptimizerRecord) -> Iterator[tuple[str, object]]:
    for number, group in enumerate(optimizer.groups):
        # What is off or left to torch is noise here; JSON has it.
        told = {name: value for name, value in group.options.items() if value is not None and value is not False}
        options = ", ".join(f"{name} {_format_option(value)}" for name, value in told.items())
        yield f"group {number}", f"{format_number_of(len(group.parameters), 'parameter')}; {options or 'no options'}"


def _format_option(value: Any) -> str:
    """A hyper-parameter as Python writes it; tags (see the specification) are taken off."""
    if isinstance(value, dict) and "tuple" in value and isinstance(value["tuple"], list):
        return f"({', '.join(map(_format_option, value['tuple']))})"
    for tag in ("tensor", "float"):
        if isinstance(value, dict) and tag in value:
            return _format_option(value[tag])
    return value if isinstance(value, str) else repr(value)


def _tensor_table(tensors: tuple[TensorRecord, ...]) -> Table:
    from .tables import cell, plain_table

    table = plain_table("  tensor", "dtype", "shape", "layer", "note")
    for tensor in tensors:
        notes = [
            *(["buffer"] if tensor.kind == "buffer" else []),
            *(["frozen"] if tensor.kind == "parameter" and not tensor.trainable else []),
            *([f"tied to {tensor.tied_to}"] if tensor.tied_to is not None else []),
        ]
        shape = ", ".join(map(str, tensor.shape))
        row = (f"  {tensor.fqn}", tensor.dtype, f"[{shape}]", tensor.layer, ", ".join(notes))
        table.add_row(*map(cell, row))
    return table
