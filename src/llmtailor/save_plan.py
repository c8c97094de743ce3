"""What one save will write and what it will link, decided before a byte moves.

Pure but for looking at tensors' shapes: the live state, the checkpoint before, and the strategy go in; images of the
files to write, records of the files to link, and the reasons come out. ``estimate`` is this plan, printed.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch

from .codecs import Deviation, Rest
from .drift import LayerDrift
from .errors import StrategyIgnoredWarning, UnsupportedError, WriteError
from .layers import Layer, file_stem, part_suffix
from .live_state import LiveLayers
from .local_parts import Seat
from .manifest import (
    EncodingRecord,
    ErrorRecord,
    FileRecord,
    LayerRecord,
    Manifest,
    OptimizerRecord,
    PartRecord,
    TensorRecord,
)
from .model_state import is_adapted
from .strategies import CODED, NO_BASE, NO_GAIN, Choice, Full, LayerStatus, SaveContext, Strategy, choose_layers
from .votes import digest_choice
from .writer import CodedImage, LayerImage, WrittenCodes, WrittenLayer, code_layer

__all__ = ["Contents", "SavePlan", "applicable_strategy", "encode_index", "layer_statuses", "plan_save"]

Contents = Literal["full", "weights"]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class SavePlan:
    """One save, decided."""

    step: int
    save_index: int
    contents: Contents
    strategy: str
    """As the user would write it."""
    tensors: tuple[TensorRecord, ...]
    optimizers: tuple[OptimizerRecord, ...]
    layers: tuple[Layer, ...]
    """Those that have a tensor to save, in model order."""
    choices: tuple[Choice, ...]
    """One per layer, in the same order."""
    images: tuple[LayerImage | CodedImage, ...]
    """Of the layers that are written, exactly or as codes; held, see ``LayerImage.hold``."""
    previous: Mapping[str, LayerRecord]
    """Layer -> its record in the checkpoint before, where that can be linked; with this rank's files alone."""
    kept: frozenset[str]
    """Layers that no rank writes."""
    seat: Seat
    layout: str | None
    """Digest of how tensors are cut over ranks; None if none is."""
    choice: str
    """Digest of what is to be written, which must be the same on every rank."""
    has_whole_weights: bool
    """Every layer's weights are in one file, which stock tools read."""
    drifts: Mapping[str, LayerDrift]
    """By layer; empty if nothing was measured."""
    shares: Mapping[str, float]
    """Of the same layers, of what a step achieves."""

    @property
    def nbytes(self) -> int:
        """Bytes of the files that are written, about."""
        return sum(image.nbytes for image in self.images)

    @property
    def num_files(self) -> int:
        """Files that are made, links included, at most."""
        written = sum(len(image.names) for image in self.images)
        return written + sum(len(record.files) for record in self.previous.values())

    def rebase(self, parent: Manifest | None) -> SavePlan:
        """The same plan after the checkpoint that is its parent in the end.

        A save may be planned while the one before is in flight. When its turn to be committed comes, that one is
        published, or it failed: then layers which were to be linked from it are linked from the one before, where that
        holds the same tensors.
        """
        records = {} if parent is None else _find_alike(parent, self, self.contents, self.seat)
        return replace(self, previous={layer: records[layer] for layer in self.previous if layer in records})

    def links(self, written: Mapping[str, WrittenLayer]) -> tuple[tuple[str, FileRecord], ...]:
        """Files that are taken over, and their layers: of those not written, and plain ones that codes lie beside.

        Args:
            written: Layer -> the files it was written to; exactly the layers of ``images``.

        Raises:
            WriteError: A layer that is not written, or what its codes are relative to, is in no checkpoint.
        """
        linked: list[tuple[str, FileRecord]] = []
        for layer in self.layers:
            each = written.get(layer.name)
            files: tuple[FileRecord, ...] = ()
            if layer.name in self.kept:
                files = self._previous_of(layer.name).files
            elif each is not None and each.codes is not None and each.weights is None:
                files = self._base_of(layer.name, each).plain_files
            linked += [(layer.name, file) for file in files]
        return tuple(linked)

    def record_layers(self, written: Mapping[str, WrittenLayer]) -> tuple[LayerRecord, ...]:
        """The manifest's layers, once the files are written.

        Args:
            written: As for ``links``.

        Raises:
            WriteError: As ``links``.
        """
        return tuple(
            self._record(layer, choice, written.get(layer.name))
            for layer, choice in zip(self.layers, self.choices, strict=True)
        )

    def _record(self, layer: Layer, choice: Choice, written: WrittenLayer | None) -> LayerRecord:
        if layer.name in self.kept:
            update = {"reason": choice.reason, **self._measured(layer.name)}
            return self._previous_of(layer.name).model_copy(update=update)
        codes = None if written is None else written.codes
        encoding = None if written is None or codes is None else self._record_codes(codes, written.update_count)
        if written is not None and encoding is not None and written.weights is None:
            update = {"reason": CODED, "encoding": encoding, **self._measured(layer.name)}
            return self._base_of(layer.name, written).model_copy(update=update)
        weights, optimizer, part = self._place(written)
        return LayerRecord(
            name=layer.name,
            kind=layer.kind.value,
            stack=layer.stack,
            index=layer.index,
            step=self.step,
            save_index=self.save_index,
            update_count=written.update_count if written is not None and codes is None else None,
            reason=CODED if codes is not None else (written and written.reason) or choice.reason,
            weights=weights,
            optimizer=optimizer,
            encoding=encoding,
            parts=() if part is None else (part,),
            **self._measured(layer.name),
        )

    def _measured(self, layer: str) -> dict[str, Any]:
        """What is recorded of how a layer moves; JSON has no infinite numbers."""
        drift = self.drifts[layer].relative if layer in self.drifts else None
        return {"drift": _round(drift), "share": _round(self.shares.get(layer))}

    def _place(self, written: WrittenLayer | None) -> tuple[FileRecord | None, FileRecord | None, PartRecord | None]:
        """What this rank wrote of a layer: whole files, and its part of those that are spread over ranks."""
        if written is None:  # another rank did
            return None, None, None
        files = (written.weights, written.optimizer)
        suffix = f"{part_suffix(self.seat.rank)}.safetensors"
        whole = [None if file is None or file.path.endswith(suffix) else file for file in files]
        parts = [file if file is not None and file.path.endswith(suffix) else None for file in files]
        part = PartRecord(rank=self.seat.rank, weights=parts[0], optimizer=parts[1]) if any(parts) else None
        return whole[0], whole[1], part

    def _record_codes(self, codes: WrittenCodes, update_count: int | None) -> EncodingRecord:
        return EncodingRecord(
            step=self.step,
            save_index=self.save_index,
            update_count=update_count,
            rest=codes.rest,
            base=codes.base,
            codes=codes.file,
            errors={component.value: _record_error(each) for component, each in codes.deviations.items()},  # type: ignore[misc]
        )

    def _previous_of(self, layer: str) -> LayerRecord:
        if layer not in self.previous:
            raise WriteError(
                "a layer of this save was to come from a save that failed",
                kind="parent-failed",
                layer=layer,
                expected="a checkpoint that holds it",
                found="none",
                hint="the next save writes all layers",
            )
        return self.previous[layer]

    def _base_of(self, layer: str, written: WrittenLayer) -> LayerRecord:
        """The record whose plain files a layer's codes are relative to."""
        record = self._previous_of(layer)
        # Codes are made when all earlier saves have ended, so this cannot differ.
        assert written.codes is not None
        assert written.codes.base_digest == record.whole_weights.digest, layer
        return record


def _round(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _record_error(deviation: Deviation) -> ErrorRecord:
    return ErrorRecord(l2=float(f"{deviation.l2:.4g}"), max=float(f"{deviation.largest:.4g}"))


def plan_save(
    live: LiveLayers,
    *,
    step: int,
    contents: Contents,
    strategy: Strategy,
    rest: Rest | None,
    parent: Manifest | None,
    is_linkable: Callable[[str, Sequence[FileRecord]], bool],
    seat: Seat = Seat(),  # noqa: B008
    drifts: Mapping[str, LayerDrift] = _NOTHING,
    shares: Mapping[str, float] = _NOTHING,
) -> SavePlan:
    """Decide one save.

    Args:
        live: The live state.
        step: Optimizer steps done.
        contents: Whether optimizer state is saved.
        strategy: Chooses among the layers; those without earlier files are written anyhow.
        rest: How layers that it does not choose are written as codes; None leaves them as they are.
        parent: The checkpoint before, or None.
        is_linkable: Whether files of a layer of the parent are still there, unharmed as far as can be seen at once. On
            several ranks it must say the same on each.
        seat: Which rank this is.
        drifts: How each layer moved since it was last saved, if that was measured; the same on every rank.
        shares: Of each layer, of what a step of training achieves.

    Raises:
        InvalidInputError: The strategy names no layer, or needs to know what is not measured.
        UnsupportedError: Layers that are spread over ranks are to be coded.
    """
    if rest is not None and live.layout is not None:
        raise _refuse_codes(rest)
    previous = {} if parent is None else _find_linkable(parent, live, contents, is_linkable, seat)
    save_index = 0 if parent is None else parent.save_index + 1
    context = SaveContext(
        step=step,
        save_index=save_index,
        previous_step=None if parent is None else parent.step,
        layers=layer_statuses(live, previous, drifts),
    )
    chosen = choose_layers(strategy, context)
    planned = [_plan_layer(choice, live, rest, previous) for choice in chosen]
    kept = frozenset(choice.layer for choice in chosen if not choice.is_saved) if rest is None else frozenset[str]()
    return SavePlan(
        step=step,
        save_index=save_index,
        contents=contents,
        strategy=strategy.text,
        tensors=live.tensors,
        optimizers=live.optimizers,
        layers=live.layers,
        choices=tuple(choice for choice, _ in planned),
        images=tuple(image for _, image in planned if image is not None),
        previous=previous,
        kept=kept,
        seat=seat,
        layout=live.layout,
        choice=_digest(context, chosen, contents, strategy, rest),
        has_whole_weights=not any(_has_part_of_weights(image, seat) for image in live.images.values()),
        drifts=drifts,
        shares=shares,
    )


def _digest(
    context: SaveContext, chosen: Sequence[Choice], contents: Contents, strategy: Strategy, rest: Rest | None
) -> str:
    """Of what is to be written, and by which rule."""
    told: dict[str, object] = {"step": context.step, "save_index": context.save_index}
    told |= {"contents": contents, "strategy": strategy.text, "rest": rest and rest.text}
    return digest_choice(told | {"layers": [[each.layer, each.is_saved, each.reason] for each in chosen]})


def _refuse_codes(rest: Rest) -> UnsupportedError:
    return UnsupportedError(
        "codes of layers that are spread over ranks are not supported yet",
        kind="sharded-codes",
        expected='rest="skip"',
        found=f"rest={rest.text!r}",
        hint="leave rest out; rest works where every rank holds the whole state (DDP)",
    )


def applicable_strategy(strategy: Strategy, module: torch.nn.Module) -> Strategy:
    """The strategy, or for a model with adapters a full one; warns if that is another."""
    if not is_adapted(module) or isinstance(strategy, Full):
        return strategy
    # PEFT's own file always holds the whole adapter as it is now: beside it, a composite would be another model.
    warnings.warn(
        f"{strategy.text} is not applied to adapters: they are saved whole, as PEFT's own file is",
        StrategyIgnoredWarning,
        stacklevel=2,
    )
    return Full()


def layer_statuses(
    live: LiveLayers, previous: Mapping[str, LayerRecord] = _NOTHING, drifts: Mapping[str, LayerDrift] = _NOTHING
) -> tuple[LayerStatus, ...]:
    """What a strategy is told of the layers; the same on every rank.

    Args:
        live: What there is to save.
        previous: Layer -> its record in the checkpoint before, where that can be linked.
        drifts: How each layer moved since.
    """
    return tuple(
        LayerStatus(
            name=layer.name,
            kind=layer.kind,
            stack=layer.stack,
            index=layer.index,
            nbytes=live.nbytes[layer.name],
            saved_step=previous[layer.name].step if layer.name in previous else None,
            drift=drifts.get(layer.name),
        )
        for layer in live.layers
    )


def _has_part_of_weights(image: LayerImage, seat: Seat) -> bool:
    return image.weights is not None and f"{part_suffix(seat.rank)}." in image.weights.name


def _plan_layer(
    choice: Choice, live: LiveLayers, rest: Rest | None, previous: Mapping[str, LayerRecord]
) -> tuple[Choice, LayerImage | CodedImage | None]:
    """What becomes of a layer, and the image of what is written."""
    image = live.images.get(choice.layer)
    if image is None or (rest is None and not choice.is_saved):
        return choice, None
    if choice.is_saved or rest is None:
        return choice, image.hold()
    coded = code_layer(image, rest)
    if coded is None:
        return replace(choice, is_saved=True, reason=NO_GAIN), image.hold()
    base = previous[choice.layer]
    has_base = base.has_exact_weights and (base.optimizer is not None or not coded.is_relative_to_state)
    if rest.is_relative and not has_base:
        return replace(choice, is_saved=True, reason=NO_BASE), image.hold()
    return choice, coded.hold()


def _find_linkable(
    parent: Manifest,
    live: LiveLayers,
    contents: Contents,
    is_linkable: Callable[[str, Sequence[FileRecord]], bool],
    seat: Seat,
) -> dict[str, LayerRecord]:
    """Layers of the parent that are alike, and whose files are there."""
    alike = _find_alike(parent, live, contents, seat)
    return {name: layer for name, layer in alike.items() if is_linkable(name, layer.files)}


def _find_alike(parent: Manifest, now: LiveLayers | SavePlan, contents: Contents, seat: Seat) -> dict[str, LayerRecord]:
    """Layers of the parent whose files stand for the same tensors as now, cut alike, and the same optimizers."""
    if parent.contents != contents or parent.world.layout != now.layout:
        return {}
    if [each.name for each in parent.optimizers] != [each.name for each in now.optimizers]:
        return {}
    new, old = _schema_by_layer(now.tensors), _schema_by_layer(parent.tensors)
    records = _restrict_layers(parent, now.layers, seat)
    return {name: layer for name, layer in records.items() if new.get(name) == old[name]}


def _restrict_layers(parent: Manifest, layers: Sequence[Layer], seat: Seat) -> dict[str, LayerRecord]:
    """Layers of a checkpoint by name, each with the files that are this rank's to link."""
    records = {layer.name: layer for layer in parent.layers}
    if seat.size == 1:
        return records
    numbered = ((number, records[layer.name]) for number, layer in enumerate(layers) if layer.name in records)
    return {record.name: _restrict(record, seat, owns_whole=seat.owns(number)) for number, record in numbered}


def _restrict(record: LayerRecord, seat: Seat, *, owns_whole: bool) -> LayerRecord:
    update: dict[str, object] = {"parts": tuple(part for part in record.parts if part.rank == seat.rank)}
    if not owns_whole:
        update |= {"weights": None, "optimizer": None, "encoding": None}
    return record.model_copy(update=update)


def _schema_by_layer(records: Sequence[TensorRecord]) -> dict[str, list[TensorRecord]]:
    schema: dict[str, list[TensorRecord]] = {}
    for record in records:
        schema.setdefault(record.layer, []).append(record)
    return schema


def encode_index(plan: SavePlan) -> str:
    """The index by which stock tools find each tensor's file, as JSON.

    Source: transformers 5.23, modeling_utils.py (save_pretrained; keys ``metadata.total_size``, ``weight_map``).
    """
    held = [record for record in plan.tensors if record.tied_to is None]
    stems = {layer.name: file_stem(layer) for layer in plan.layers}
    weight_map = {record.fqn: f"model-{stems[record.layer]}.safetensors" for record in held}
    total = sum(record.meta.nbytes for record in held)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"
