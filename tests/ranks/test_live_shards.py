"""The files that ranks would write hold every element of every tensor exactly once, however the state is spread."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmtailor.formats.safetensors import Header, read_header
from llmtailor.formats.tailored.shards import read_shards
from llmtailor.shards import Shard, do_shards_tile
from llmtailor.state_keys import NOTES_KEY
from ranks.launch import run_ranks

PROGRAM = Path(__file__).parent / "live_shards.py"
ON_TWO = [
    "ddp-plain",
    "ddp-plain-spread",
    "fsdp-foreach",
    "fsdp-fused-spread",
    "fsdp_alone-plain",
    "tp-momentum-spread",
]
ON_FOUR = ["fsdp-plain-spread", "fsdp_tp-plain", "hsdp-foreach-spread", "ddp_tp-plain-spread"]
CASES = [(2, case) for case in ON_TWO] + [(4, case) for case in ON_FOUR]
IDS = [f"{case} on {num_ranks}" for num_ranks, case in CASES]
WHOLE = ("ddp-", "fsdp_alone-")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the ranks wrote."""

    name: str
    ranks: list[Path]
    told: list[dict[str, Any]]
    truth: dict[str, torch.Tensor]

    @property
    def files(self) -> list[Path]:
        return [path for rank in self.ranks for path in sorted(rank.rglob("*.safetensors"))]

    def pieces(self) -> dict[str, list[tuple[Shard, torch.Tensor]]]:
        found: dict[str, list[tuple[Shard, torch.Tensor]]] = {}
        for path in self.files:
            shards = read_shards(path, header_of(path))
            for name, tensor in load_file(path).items():
                found.setdefault(name, []).append((shards[name], tensor))
        return found


def header_of(path: Path) -> Header:
    with path.open("rb") as file:
        return read_header(file.fileno(), path)[0]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("live-shards")
    run_ranks(PROGRAM, 2, directory / "2", *ON_TWO)
    run_ranks(PROGRAM, 4, directory / "4", *ON_FOUR)
    return directory


@pytest.fixture(params=CASES, ids=IDS)
def case(directory: Path, request: pytest.FixtureRequest) -> Case:
    num_ranks, name = request.param
    ranks = [directory / str(num_ranks) / name / f"rank-{rank}" for rank in range(num_ranks)]
    return Case(
        name=name,
        ranks=ranks,
        told=[json.loads((rank / "live.json").read_text()) for rank in ranks],
        truth=load_file(ranks[0].parent / "whole.safetensors"),
    )


def test_files_hold_every_element_once(case: Case) -> None:
    pieces = case.pieces()
    assert pieces.keys() == case.truth.keys()
    for name, expected in case.truth.items():
        assert do_shards_tile([shard for shard, _ in pieces[name]]), name
        found = torch.empty_like(expected)
        for shard, tensor in pieces[name]:
            ends = zip(shard.offsets, shard.sizes, strict=True)
            found[tuple(slice(start, start + size) for start, size in ends)] = tensor
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), name


def test_parts_are_named_for_their_rank_and_whole_files_are_written_once(case: Case) -> None:
    names = [path.relative_to(rank).as_posix() for rank in case.ranks for path in sorted(rank.rglob("*.safetensors"))]
    assert len(names) == len(set(names))
    for rank, told in enumerate(case.told):
        assert all(told["files"].values())
        assert told["ranks"].keys() == {name for files in told["files"].values() for name in files}
        for name, of_rank in told["ranks"].items():
            assert of_rank in (None, rank)
            assert name.endswith(f".rank-{rank:05d}.safetensors") == (of_rank == rank)
    parts = [name for name in names if ".rank-" in name]
    assert bool(parts) != case.name.startswith(WHOLE)


def test_empty_shards_are_not_written(case: Case) -> None:
    for name, pieces in case.pieces().items():
        assert all(tensor.numel() for _, tensor in pieces) or not case.truth[name].numel(), name


def test_ranks_agree_without_talking(case: Case) -> None:
    first = case.told[0]
    for told in case.told:
        assert (told["nbytes"], told["layout"], told["shapes"]) == (first["nbytes"], first["layout"], first["shapes"])
    assert (first["layout"] is None) == case.name.startswith(WHOLE)


def test_sizes_and_schema_are_of_whole_tensors(case: Case) -> None:
    first = case.told[0]
    expected = dict.fromkeys(first["layers"], 0)
    layers = {fqn: layer for fqn, (_, _, layer) in first["shapes"].items()}
    for name, tensor in case.truth.items():
        fqn = name.removeprefix("state.").rpartition(".")[0] if name.startswith("state.") else name
        expected[layers[fqn]] += tensor.nbytes
        if fqn == name:
            assert first["shapes"][name][1] == list(tensor.shape)
    assert first["nbytes"] == expected


def test_notes_are_in_one_file(case: Case) -> None:
    with_notes = [path for path in case.files if NOTES_KEY in header_of(path).metadata]
    assert len(with_notes) == 1


def test_owners_count_updates(case: Case) -> None:
    if "momentum" in case.name:
        assert all(count is None for told in case.told for count in told["updates"].values())
        return
    for layer in case.told[0]["layers"]:
        counts = [told["updates"][layer] for told in case.told if layer in told["updates"]]
        assert [count for count in counts if count is not None] == [3], layer


def test_owners_are_all_ranks_where_layers_are_dealt_out(case: Case) -> None:
    """By who writes what all ranks hold, such as counts of updates."""
    if "momentum" in case.name:
        return
    owners = [
        next(rank for rank, told in enumerate(case.told) if told["updates"].get(layer) is not None)
        for layer in case.told[0]["layers"]
    ]
    size = len(case.ranks)
    assert owners == [number % size if case.name.endswith("-spread") else 0 for number in range(len(owners))]


def test_layouts_differ_where_cuts_do(directory: Path) -> None:
    told = {
        (num_ranks, name): json.loads((directory / str(num_ranks) / name / "rank-0" / "live.json").read_text())
        for num_ranks, name in CASES
        if not name.startswith(WHOLE)
    }
    assert len({each["layout"] for each in told.values()}) == len(told) - 1
    assert told[2, "fsdp-foreach"]["layout"] == told[2, "fsdp-fused-spread"]["layout"]


def test_mesh_of_one_rank_writes_what_is_written_without_it(directory: Path) -> None:
    alone, plain = directory / "2" / "fsdp_alone-plain" / "rank-0", directory / "2" / "ddp-plain" / "rank-0"
    names = sorted(path.relative_to(alone) for path in alone.rglob("*.safetensors"))
    assert names == sorted(path.relative_to(plain) for path in plain.rglob("*.safetensors"))
    assert all((alone / name).read_bytes() == (plain / name).read_bytes() for name in names)
