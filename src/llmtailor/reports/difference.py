"""How two checkpoints differ, layer by layer, or tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..diff import Difference, Distance, LayerDifference, Side, TensorDifference, Unmatched
from ..diff.records import WEIGHTS
from ..state_keys import state_key
from .units import format_number_of

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

__all__ = ["DifferencePage"]

_SAME = "="
_MOST_UNMATCHED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferencePage:
    """What ``llmtailor diff`` shows."""

    difference: Difference
    has_tensors: bool = False
    """Every tensor instead of every layer."""

    def names(self) -> list[str]:
        """What differs: layers, or tensors as layer files call them."""
        if not self.has_tensors:
            return [layer.name for layer in self.difference.layers if not layer.is_identical]
        unequal = [_key_of(each) for each in self.difference.tensors if not each.distance.is_equal]
        return unequal + [_key_of(each) for each in self.difference.unmatched]

    def record(self) -> dict[str, Any]:
        difference = self.difference
        record: dict[str, Any] = {
            "is_identical": difference.is_identical,
            "a": _side_record(difference.a),
            "b": _side_record(difference.b),
            "layers": [_layer_record(layer) for layer in difference.layers],
            "totals": _distance_records(difference.totals),
            "unmatched": [_unmatched_record(each) for each in difference.unmatched],
        }
        if self.has_tensors:
            record["tensors"] = [_tensor_record(tensor) for tensor in difference.tensors]
        return record

    def tables(self) -> Iterator[RenderableType]:
        from .tables import facts_table, heading, line

        difference = self.difference
        yield facts_table((f"{name}  {side.path}", _describe_side(side)) for name, side in _sides(difference))
        yield line("")
        yield _tensor_table(difference) if self.has_tensors else _layer_table(difference)
        for title, unmatched in _unmatched_by_reason(difference):
            yield heading(f"{format_number_of(len(unmatched), 'tensor')} {title}")
            yield _unmatched_table(unmatched)
            if len(unmatched) > _MOST_UNMATCHED:
                yield line(f"  ... and {len(unmatched) - _MOST_UNMATCHED} more; --json has all")
        yield line("")
        for note in _notes(difference):
            yield line(f"note: {note}")
        yield line(*_verdict(difference))


def _sides(difference: Difference) -> tuple[tuple[str, Side], ...]:
    return ("A", difference.a), ("B", difference.b)


def _describe_side(side: Side) -> str:
    return side.format if side.step is None else f"{side.format}, step {side.step}"


def _key_of(each: TensorDifference | Unmatched) -> str:
    return each.fqn if each.component == WEIGHTS else state_key(each.fqn, each.component)


def _side_record(side: Side) -> dict[str, Any]:
    return {
        "path": str(side.path),
        "format": side.format,
        "step": side.step,
        "has_optimizer": side.has_optimizer,
    }


def _layer_record(layer: LayerDifference) -> dict[str, Any]:
    return {
        "name": layer.name,
        "step_a": layer.step_a,
        "step_b": layer.step_b,
        "is_identical": layer.is_identical,
        "same_files": list(layer.same_files),
        "components": _distance_records(layer.distances),
    }


def _distance_records(distances: Mapping[str, Distance]) -> dict[str, dict[str, Any]]:
    return {name: _distance_record(distance) for name, distance in distances.items()}


def _distance_record(distance: Distance) -> dict[str, Any]:
    """JSON has no infinity: None stands for it, and for a cosine that there is none of."""
    return {
        "relative_l2": _finite(distance.relative),
        "l2": _finite(distance.l2),
        "max_abs": _finite(distance.max_abs),
        "cosine": distance.cosine,
        "unchanged": distance.unchanged,
        "numel": distance.numel,
        "num_equal": distance.num_equal,
        "num_unread": distance.num_unread,
        "norm_a": _finite(distance.norm_a),
        "norm_b": _finite(distance.norm_b),
        "nan_a": distance.nan_a,
        "nan_b": distance.nan_b,
        "inf_a": distance.inf_a,
        "inf_b": distance.inf_b,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tensor_record(tensor: TensorDifference) -> dict[str, Any]:
    return {
        "layer": tensor.layer,
        "component": tensor.component,
        "fqn": tensor.fqn,
        "shape": list(tensor.a.shape),
        "dtype_a": tensor.a.dtype,
        "dtype_b": tensor.b.dtype,
        **_distance_record(tensor.distance),
    }


def _unmatched_record(each: Unmatched) -> dict[str, Any]:
    return {
        "layer": each.layer,
        "component": each.component,
        "fqn": each.fqn,
        "shape_a": None if each.a is None else list(each.a.shape),
        "shape_b": None if each.b is None else list(each.b.shape),
        "dtype_a": None if each.a is None else each.a.dtype,
        "dtype_b": None if each.b is None else each.b.dtype,
    }


def _layer_table(difference: Difference) -> Table:
    from .tables import cell, plain_table

    has_steps = any(layer.step_a is not None or layer.step_b is not None for layer in difference.layers)
    has_faults = any(distance.num_not_finite for distance in difference.totals.values())
    table = plain_table(
        "  layer",
        *((">step A", ">step B") if has_steps else ()),
        *(f">{name}" for name in difference.components),
        *((">max", ">cosine", ">unchanged") if WEIGHTS in difference.components else ()),
        *((">not finite A, B",) if has_faults else ()),
    )
    worst = {name: _worst(layer.distances.get(name) for layer in difference.layers) for name in difference.components}
    for layer in difference.layers:
        row = [
            cell(f"  {layer.name}"),
            *((cell(layer.step_a), cell(layer.step_b)) if has_steps else ()),
            *(_relative_cell(layer.find_distance(name), worst[name]) for name in difference.components),
            *_weights_cells(difference, layer.distances),
            *((_fault_cell(layer.distances),) if has_faults else ()),
        ]
        table.add_row(*row, style="dim" if layer.is_identical else "")
    totals = [
        cell("  total"),
        *((cell(""), cell("")) if has_steps else ()),
        *(_relative_cell(difference.totals[name], None) for name in difference.components),
        *_weights_cells(difference, difference.totals),
        *((_fault_cell(difference.totals),) if has_faults else ()),
    ]
    table.add_row(*totals, style="bold")
    return table


def _worst(distances: Iterator[Distance | None]) -> float | None:
    """The largest relative difference; None if there is none."""
    return max((each.relative for each in distances if each is not None and each.relative), default=None)


def _relative_cell(distance: Distance | None, worst: float | None) -> Text:
    from .tables import cell

    if distance is None:
        return cell(None)
    if distance.is_equal:
        return cell(_SAME)
    return cell(f"{distance.relative:.3g}", "bold yellow" if distance.relative == worst else "")


def _weights_cells(difference: Difference, distances: Mapping[str, Distance]) -> tuple[Text, ...]:
    from .tables import cell

    if WEIGHTS not in difference.components:
        return ()
    distance = distances.get(WEIGHTS)
    if distance is None:
        return cell(None), cell(None), cell(None)
    return cell(_format_max(distance)), cell(_format_cosine(distance)), cell(_format_unchanged(distance))


def _format_max(distance: Distance) -> str:
    return _SAME if distance.is_equal else f"{distance.max_abs:.3g}"


def _format_cosine(distance: Distance) -> str | None:
    if distance.is_equal:
        return _SAME
    return None if distance.cosine is None else f"{distance.cosine:.6f}"


def _format_unchanged(distance: Distance) -> str:
    """Never 100 % of what is not."""
    text = f"{100 * distance.unchanged:.3g} %"
    return text if distance.is_equal or text != "100 %" else ">99.9 %"


def _fault_cell(distances: Mapping[str, Distance]) -> Text:
    from .tables import cell

    in_a = sum(each.nan_a + each.inf_a for each in distances.values())
    in_b = sum(each.nan_b + each.inf_b for each in distances.values())
    return cell(f"{in_a}, {in_b}", "bold red") if in_a or in_b else cell(None)


def _tensor_table(difference: Difference) -> Table:
    from .tables import cell, plain_table

    columns = ("  tensor", "component", "type", "shape", ">relative", ">l2", ">max", ">cosine", ">unchanged")
    has_faults = any(tensor.distance.num_not_finite for tensor in difference.tensors)
    table = plain_table(*columns, *((">not finite A, B",) if has_faults else ()))
    worst = {
        name: _worst(tensor.distance for tensor in difference.tensors if tensor.component == name)
        for name in difference.components
    }
    for tensor in difference.tensors:
        distance = tensor.distance
        is_alike = tensor.a.dtype == tensor.b.dtype
        row = [
            cell(f"  {tensor.fqn}"),
            cell(tensor.component),
            cell(tensor.a.dtype if is_alike else f"{tensor.a.dtype}, {tensor.b.dtype}"),
            cell(list(tensor.a.shape)),
            _relative_cell(distance, worst[tensor.component]),
            cell(_SAME if distance.is_equal else f"{distance.l2:.3g}"),
            cell(_format_max(distance)),
            cell(_format_cosine(distance)),
            cell(_format_unchanged(distance)),
            *((_fault_cell({"": distance}),) if has_faults else ()),
        ]
        table.add_row(*row, style="dim" if distance.is_equal else "")
    return table


def _unmatched_by_reason(difference: Difference) -> Iterator[tuple[str, Sequence[Unmatched]]]:
    """Titles that follow a number of tensors, and the tensors; none of an optimizer that only one checkpoint has."""
    has_both = difference.a.has_optimizer == difference.b.has_optimizer
    found = [each for each in difference.unmatched if has_both or each.component == WEIGHTS]
    for title, each in (
        ("only in A", [each for each in found if each.b is None]),
        ("only in B", [each for each in found if each.a is None]),
        ("of another shape", [each for each in found if each.a is not None and each.b is not None]),
    ):
        if each:
            yield title, each


def _unmatched_table(unmatched: Sequence[Unmatched]) -> Table:
    from .tables import cell, plain_table

    table = plain_table("  tensor", "component", "A", "B")
    for each in unmatched[:_MOST_UNMATCHED]:
        table.add_row(cell(f"  {each.fqn}"), cell(each.component), cell(each.a), cell(each.b))
    return table


def _notes(difference: Difference) -> Iterator[str]:
    unread = [
        layer
        for layer in difference.layers
        if layer.same_files or any(distance.num_unread for distance in layer.distances.values())
    ]
    if unread:
        of_layers = f"{len(unread)} of {format_number_of(len(difference.layers), 'layer')}"
        yield f"of {of_layers} something lies in the same files in A and B: not read; totals are relative to the rest"
    missing = [each for each in difference.unmatched if each.component != WEIGHTS]
    without = [name for name, side in _sides(difference) if not side.has_optimizer]
    if missing and len(without) == 1:
        yield f"{without[0]} has no optimizer state, so all layers differ; --only weights compares the weights alone"
    retyped = sum(tensor.a.dtype != tensor.b.dtype for tensor in difference.tensors)
    if retyped:
        yield f"{format_number_of(retyped, 'tensor')} of another type in A than in B: compared by value"


def _verdict(difference: Difference) -> tuple[str, str]:
    """A line, and its style."""
    if difference.is_identical:
        return "A and B are identical", "green"
    num_different = sum(not layer.is_identical for layer in difference.layers)
    return f"A and B differ in {num_different} of {format_number_of(len(difference.layers), 'layer')}", "bold"
