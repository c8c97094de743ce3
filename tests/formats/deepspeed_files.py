"""The real DeepSpeed checkpoints of ``tests/compat``, and copies of them with something changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from formats.simple_writer import assemble, load_ref
from llmtailor.catalog import Catalog
from llmtailor.formats.torch_files import open_torch_file, plan_torch_file

DIRECTORY = Path(__file__).parent.parent / "compat" / "data" / "deepspeed-0.19.8"
NAMES = tuple(sorted(path.name for path in DIRECTORY.iterdir() if path.is_dir()))
TAG = "global_step3"


def fixture_truth(name: str) -> dict[str, Any]:
    """Digests of what the live engine held: master and weights by fqn, state by fqn and name."""
    found: dict[str, Any] = json.loads((DIRECTORY / f"{name}.json").read_text())
    return found


def copy_fixture(name: str, directory: Path) -> Path:
    return Path(shutil.copytree(DIRECTORY / name, directory / name))


def optim_file(checkpoint: Path, rank: int) -> Path:
    (found,) = (checkpoint / TAG).glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return found


def model_file(checkpoint: Path, rank: int = 0) -> Path:
    whole = checkpoint / TAG / "mp_rank_00_model_states.pt"
    return whole if whole.exists() else checkpoint / TAG / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Change what is in a torch file."""
    tree = open_torch_file(path)
    change(tree)
    path.write_bytes(assemble(plan_torch_file(path.name, tree)))


def assert_same_tensors(found: Catalog, expected: Catalog) -> None:
    """Names, order, types and bytes of everything, and the groups."""
    assert list(found.weights) == list(expected.weights)
    assert found.masters.keys() == expected.masters.keys()
    assert found.states.keys() == expected.states.keys()
    for kind in ("weights", "masters"):
        for fqn, ref in getattr(expected, kind).items():
            assert_same(getattr(found, kind)[fqn], ref, f"{kind} {fqn}")
    for fqn, state in expected.states.items():
        assert found.states[fqn].notes == state.notes, fqn
        assert list(found.states[fqn].tensors) == list(state.tensors), fqn
        for leaf, ref in state.tensors.items():
            assert_same(found.states[fqn].tensors[leaf], ref, f"{leaf} of {fqn}")
    assert found.optimizers == expected.optimizers
    assert (found.ties, found.buffers, found.step) == (expected.ties, expected.buffers, expected.step)


def assert_same(found: Any, expected: Any, what: str) -> None:
    assert found.meta == expected.meta, what
    assert torch.equal(load_ref(found), load_ref(expected)), what
