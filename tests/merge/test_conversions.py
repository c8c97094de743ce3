"""Every source in every format: what is written is, tensor by tensor, what was read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

import llmtailor
from formats.simple_writer import load_ref, tensor_bytes
from llmtailor.catalog import Catalog, StateRef
from llmtailor.checkpoint import open_checkpoint
from llmtailor.errors import IncompatibleError, UnsupportedError
from llmtailor.formats import detect_format, open_catalog
from llmtailor.load import plan_load, plan_model
from llmtailor.manifest import digest_of
from llmtailor.model_state import read_model
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


class Normed(torch.nn.Module):
    """Its blocks have buffers of floating point, and counts."""

    def __init__(self) -> None:
        super().__init__()
        blocks = (torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8)) for _ in range(2))
        self.layers = torch.nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def new_training() -> tuple[Normed, torch.optim.Optimizer]:
    model = Normed()
    return model, torch.optim.AdamW(model.parameters())


@pytest.fixture(scope="module")
def with_buffers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Normed, Path]:
    """A DCP checkpoint, whose names do not tell which tensors are buffers."""
    torch.manual_seed(5)
    model, optimizer = new_training()
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    path = tmp_path_factory.mktemp("buffers") / "step-1"
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    with warnings.catch_warnings(action="ignore"):  # that it is one process
        dcp.save(state, checkpoint_id=path, no_dist=True)
    return model, path


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_that_does_not_tell_its_buffers_is_loaded(
    with_buffers: tuple[Normed, Path], weights_only: bool, tmp_path: Path
) -> None:
    model, source = with_buffers
    llmtailor.export(source, tmp_path / "checkpoint-1", to="tailored", weights_only=weights_only)
    made, (resumed, optimizer) = open_checkpoint(tmp_path / "checkpoint-1"), new_training()
    loaded = read_model(resumed)
    (plan_model(made, loaded) if weights_only else plan_load(made, loaded, [optimizer])).fill()
    assert model.state_dict().keys() == resumed.state_dict().keys()
    assert all(torch.equal(value, resumed.state_dict()[fqn]) for fqn, value in model.state_dict().items())


def test_what_an_optimizer_trained_is_no_buffer(with_buffers: tuple[Normed, Path], tmp_path: Path) -> None:
    _, source = with_buffers
    llmtailor.export(source, tmp_path / "checkpoint-1", to="tailored")
    other = Normed()
    for layer in other.layers:
        weight = layer[0]._parameters.pop("weight")
        layer[0].register_buffer("weight", weight.data)
    with pytest.raises(IncompatibleError) as caught:
        plan_model(open_checkpoint(tmp_path / "checkpoint-1"), read_model(other))
    assert caught.value.kind == "other-model"
    assert caught.value.fqn == "layers.0.0.weight"
