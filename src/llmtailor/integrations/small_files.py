"""The small state of a plain loop, saved in full at every save: scheduler, scaler, random numbers, objects of the user.

Everything is read back with ``weights_only=True``: tensors, numbers, text and containers, no pickled code.
"""

from __future__ import annotations

import io
import json
import random
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import FormatError, IncompatibleError, IncompleteError, UnsupportedError
from ..strict_json import parse_object

__all__ = [
    "Stateful",
    "capture_rng",
    "check_objects",
    "load_objects",
    "load_rng",
    "read_objects",
    "read_progress",
    "restore_host_rng",
    "restore_rng",
    "save_objects",
    "save_rng",
    "write_progress",
]

_PROGRESS_NAME = "run_state.json"
_RNG_STEM = "rng_state"


class Stateful(Protocol):
    """Anything that torch's convention for state fits: a scheduler, a scaler, a data loader, an average of weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def write_progress(directory: Path, step: int, objects: Iterable[str]) -> None:
    """Note the step, and of which objects there is state, where people and programs without torch can read it."""
    text = json.dumps({"global_step": step, "objects": sorted(objects)})
    (directory / _PROGRESS_NAME).write_text(text + "\n", encoding="utf-8")


def read_progress(directory: Path, objects: Collection[str]) -> int:
    """The step of a checkpoint of a plain loop.

    Raises:
        IncompleteError: It was saved by something else.
        IncompatibleError: It has state of an object that is not among ``objects``, and which would be lost.
    """
    path = directory / _PROGRESS_NAME
    if not path.is_file():
        raise IncompleteError(
            "the checkpoint was not saved by a plain loop",
            kind="other-trainer",
            path=directory,
            expected=_PROGRESS_NAME,
            found="a checkpoint of a Trainer" if (directory / "trainer_state.json").is_file() else "none",
            hint="resume it with the trainer that saved it",
        )
    progress = parse_object(path.read_bytes(), what="progress", path=path)
    if surplus := sorted(set(progress["objects"]) - set(objects)):
        raise IncompatibleError(
            f"the checkpoint has state for {', '.join(map(repr, surplus))}, and the run nothing that takes it",
            kind="surplus-object",
            path=directory,
            expected=", ".join(sorted(objects)) or "no objects",
            found=", ".join(progress["objects"]),
            hint="build the run with the same scheduler, scaler, loader and state as when it was saved; "
            "wrap the loader with batches() before resume()",
        )
    return int(progress["global_step"])


def check_objects(objects: Mapping[str, Stateful]) -> None:
    """Refuse state that could be saved and not be read back.

    Raises:
        UnsupportedError: A ``state_dict()`` holds more than tensors, numbers, text and containers.
    """
    for name, each in objects.items():
        state = _change_leaves(each.state_dict(), _without_data)
        if (err := _why_not_readable(state)) is not None:
            place, value = _find_unreadable(state)
            raise UnsupportedError(
                f"the state of {name!r} could not be read back",
                kind="object-state",
                expected="a state_dict() of tensors, numbers, text and containers",
                found=f"{place or 'all of it'}: {type(value).__module__}.{type(value).__qualname__}",
                hint="turn other objects into one of these in state_dict() and back in load_state_dict()",
            ) from err


def _why_not_readable(state: object) -> Exception | None:
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        buffer.seek(0)
        torch.load(buffer, map_location="cpu", weights_only=True)
    except Exception as err:  # torch and pickle raise a dozen types for what they refuse
        return err
    return None


def _find_unreadable(value: Any, place: str = "") -> tuple[str, object]:
    """The innermost value that cannot be read back, and where it is."""
    for key, each in _items_of(value):
        if _why_not_readable(each) is not None:
            return _find_unreadable(each, f"{place}[{key!r}]")
    return place, value


def _items_of(value: Any) -> Iterable[tuple[object, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, (list, tuple)) else ()


def _change_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same containers with other values in them."""
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _change_leaves(each, change)) for key, each in value.items())
    if type(value) in (list, tuple):
        return type(value)(_change_leaves(each, change) for each in value)
    return change(value)


def _to_plain(value: Any) -> Any:
    """Numbers of numpy as Python's, which are read back without code of numpy's: ``lr * np.cos(...)`` makes some."""
    return value.item() if isinstance(value, np.generic) else value


def _without_data(value: Any) -> Any:
    """An empty tensor costs nothing to save."""
    return value.detach().new_empty(0) if isinstance(value, torch.Tensor) else _to_plain(value)


def save_objects(directory: Path, objects: Mapping[str, Stateful], *, rank: int | None = None) -> None:
    """Save each object's ``state_dict()`` as ``<name>.pt``.

    Args:
        directory: The checkpoint, or where it is made.
        objects: By name.
        rank: Whose they are, if each rank has its own: ``<name>_<rank>.pt``.

    Raises:
        UnsupportedError: As ``check_objects``.
    """
    check_objects(objects)
    for name, each in objects.items():
        torch.save(_change_leaves(each.state_dict(), _to_plain), directory / f"{_of_rank(name, rank)}.pt")


def _of_rank(stem: str, rank: int | None) -> str:
    """As transformers names what each rank has of its own. Source: transformers 5.23, trainer.py (_save_rng_state)."""
    return stem if rank is None else f"{stem}_{rank}"


def read_objects(directory: Path, objects: Iterable[str], *, rank: int | None = None) -> dict[str, dict[str, Any]]:
    """The saved state of each object; ``rank`` as for ``save_objects``.

    Raises:
        IncompleteError: An object has no file in the checkpoint.
        FormatError: A file holds more than tensors, numbers, text and containers.
    """
    return {name: _load(directory / f"{_of_rank(name, rank)}.pt") for name in objects}


def load_objects(objects: Mapping[str, Stateful], states: Mapping[str, dict[str, Any]], *, path: Path) -> None:
    """Give each object its saved state back.

    Raises:
        IncompatibleError: An object refuses its state.
    """
    for name, each in objects.items():
        try:
            each.load_state_dict(states[name])
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as err:
            raise IncompatibleError(
                f"{name} refuses its saved state: {err}", kind="object-state", path=path / f"{name}.pt"
            ) from err


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise IncompleteError(
            f"the checkpoint has no state for {path.stem!r}",
            kind="missing-object",
            path=path,
            hint="build the run with the same scheduler, scaler, loader and state as when it was saved",
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch raises a dozen types for a file it refuses
        raise FormatError(f"cannot read {path.name}: {err}", kind="bad-object-file", path=path) from err
    return state


def save_rng(directory: Path, *, rank: int | None = None) -> None:
    """Save the state of every random number generator of this process: python, numpy, torch, CUDA.

    Args:
        directory: The checkpoint, or where it is made.
        rank: Of this process, if it is one of several.
    """
    torch.save(capture_rng(), directory / f"{_of_rank(_RNG_STEM, rank)}.pth")


def capture_rng() -> dict[str, Any]:
    """The generators' states as tensors, numbers and text."""
    numpy: dict[str, Any] = np.random.get_state(legacy=False)
    version, internal, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "internal": list(internal), "gauss_next": gauss_next},
        "numpy": {
            "kind": numpy["bit_generator"],
            "keys": numpy["state"]["key"].tolist(),
            "position": numpy["state"]["pos"],
            "has_gauss": numpy["has_gauss"],
            "gauss": numpy["gauss"],
        },
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng(state: Mapping[str, Any]) -> None:
    """Set every generator to a captured state.

    Raises:
        IncompatibleError: The number of CUDA devices differs.
    """
    restore_host_rng(state)
    saved = state.get("cuda", [])
    live = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(saved) != live:
        raise IncompatibleError(
            "the number of CUDA devices differs from when the random state was saved",
            kind="rng-devices",
            expected=len(saved),
            found=live,
            hint="run on as many devices, or resume with random_state=False and accept other random numbers",
        )
    if saved:
        torch.cuda.set_rng_state_all(saved)


def restore_host_rng(state: Mapping[str, Any]) -> None:
    """Set the generators of the host to a captured state: python, numpy, torch's on the CPU."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["internal"]), python["gauss_next"]))
    keys = np.array(numpy["keys"], dtype=np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(state["cpu"])


def load_rng(directory: Path, *, rank: int | None = None) -> dict[str, Any]:
    """Read the random state of a checkpoint; ``rank`` as for ``save_rng``."""
    return _load(directory / f"{_of_rank(_RNG_STEM, rank)}.pth")
