"""Every source in every format: what is written is, tensor by tensor, what was read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtailor
from formats.simple_writer import load_ref, tensor_bytes
from llmtailor.catalog import Catalog, StateRef
from llmtailor.errors import IncompatibleError, UnsupportedError
from llmtailor.formats import detect_format, open_catalog
from llmtailor.manifest import digest_of
from tensor_content import host_bytes

DATA = Path(__file__).parent.parent / "compat" / "data"
TARGETS = ("deepspeed", "hf", "tailored", "dcp")


def find_sources() -> Iterator[Path]:
    """Every checkpoint among the real files."""
    for tool in sorted(DATA.iterdir()):
        for path in sorted(each for each in tool.iterdir() if each.is_dir()):
            inner = sorted([*path.glob("checkpoint-*"), *path.glob("step-*")])
            yield from inner or [path]


SOURCES = list(find_sources())


def digests(directory: Path) -> dict[str, str]:
    return {str(path): digest_of(path.read_bytes()) for path in sorted(directory.rglob("*")) if path.is_file()}


def content(catalog: Catalog, untrained: Mapping[str, torch.dtype] | None = None) -> dict[str, bytes]:
    """What training goes on from: each parameter in its best precision, and each element of optimizer state.

    Args:
        catalog: Of it.
        untrained: What the target keeps in another type: of what nobody trains DeepSpeed has no fp32 copy.
    """
    found = {f"weight {fqn}": tensor_bytes(catalog.masters.get(fqn, ref)) for fqn, ref in catalog.weights.items()}
    for fqn, dtype in (untrained or {}).items():
        found[f"weight {fqn}"] = bytes(host_bytes(load_ref(catalog.weights[fqn]).to(dtype)))
    for fqn, state in catalog.states.items():
        found |= {f"{leaf} {fqn}": value for leaf, value in state_content(state).items()}
    return found


def state_content(state: StateRef) -> dict[str, bytes]:
    """A count is its value, since frameworks keep it as an int or as a float."""
    return {
        leaf: repr(float(load_ref(ref))).encode() if leaf == "step" else tensor_bytes(ref)
        for leaf, ref in state.tensors.items()
    }


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("source", SOURCES, ids=[f"{path.parent.name}-{path.name}" for path in SOURCES])
def test_export_keeps_every_tensor(source: Path, to: str, tmp_path: Path) -> None:
    before = digests(source)
    opened = open_catalog(source)
    options = {"ranks": 2} if to == "deepspeed" and opened.format != "deepspeed" else {}
    out = tmp_path / "checkpoint-3"
    refusal = try_export(source, out, to=to, weights_only=not opened.has_optimizer, **options)
    if refusal is not None:
        # Not everything can be said in every format; then nothing is written, and the reason is told.
        assert (refusal.kind, to) in EXPECTED_REFUSALS, refusal
        assert not list(tmp_path.iterdir())
        return
    assert digests(source) == before
    assert detect_format(out) == to
    made = open_catalog(out)
    untrained = {
        fqn: load_ref(ref).dtype
        for fqn, ref in made.weights.items()
        if to == "deepspeed" and fqn not in made.masters and ref.meta != opened.weights[fqn].meta
    }
    assert all(fqn not in opened.states for fqn in untrained)
    assert content(made) == content(opened, untrained)
    assert made.step == opened.step or opened.step is None or not opened.has_optimizer
    for fqn, first in opened.ties.items():
        assert made.ties.get(fqn, first) == first


def try_export(source: Path, out: Path, **options: Any) -> IncompatibleError | UnsupportedError | None:
    try:
        llmtailor.export(source, out, **options)
    except (IncompatibleError, UnsupportedError) as err:
        return err
    return None


# What a format cannot hold, or a source does not say.
EXPECTED_REFUSALS = {
    ("unknown-order", "hf"),  # no config.json, so positions cannot be known
    ("optimizer-class", "tailored"),
    ("weights-only", "deepspeed"),
}
