"""What the votes on a save say: every fault is found and its rank named, and good votes make the one whole manifest."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from faults import fake_manifest, fake_optimizer, fake_tensor
from llmtailor.errors import FormatError, WriteError
from llmtailor.manifest import FileRecord, LayerRecord, Manifest, PartRecord, World, digest_of, encode_manifest
from llmtailor.votes import (
    Fault,
    Verdict,
    Vote,
    Whereabouts,
    apply_verdict,
    decode_message,
    digest_schema,
    encode_message,
    judge,
    merge_votes,
    say_elsewhere,
    summarize,
    to_line,
)

STEP = 30
# A world takes some milliseconds to make up, and has few ways to be strange.
few = settings(max_examples=40)


@dataclass(frozen=True, kw_only=True)
class Ballot:
    """A whole manifest, and what each rank knows of it."""

    whole: Manifest
    own: dict[int, Manifest]
    votes: dict[int, Vote]


def file_of(path: str) -> FileRecord:
    return FileRecord(path=path, bytes=len(path), digest=digest_of(path.encode()))


def vote_of(rank: int, manifest: Manifest, **changes: Any) -> Vote:
    fields: dict[str, Any] = {
        "rank": rank,
        "step": STEP,
        "host": f"host-{rank}",
        "pid": 1000 + rank,
        "store": "/runs/a",
        "choice": digest_of(b"choice"),
        "schema_digest": digest_schema(manifest),
        "parent": digest_of(b"parent"),
        "layers": tuple(layer for layer in manifest.layers if layer.files),
        "files": manifest.files,
    }
    return Vote(**(fields | changes))


def restrict(whole: Manifest, rank: int, owners: list[int], writers: dict[str, int]) -> Manifest:
    """As the rank describes the save: with its own files alone."""
    layers = []
    for layer, owner in zip(whole.layers, owners, strict=True):
        update: dict[str, Any] = {"parts": tuple(part for part in layer.parts if part.rank == rank)}
        if owner != rank:
            update |= {"weights": None, "optimizer": None}
            # Whoever holds nothing of its state did not count its updates.
            update["update_count"] = layer.update_count if update["parts"] else None
        layers.append(layer.model_copy(update=update))
    files = tuple(file for file in whole.files if writers[file.path] == rank)
    return whole.model_copy(update={"layers": tuple(layers), "files": files})


@st.composite
def ballots(draw: st.DrawFn) -> Ballot:
    size = draw(st.integers(2, 8))
    names = [f"layers.{number}" for number in range(draw(st.integers(1, 5)))]
    ranks = st.integers(0, size - 1)
    layers, owners = [], []
    for index, name in enumerate(names):
        in_parts = draw(st.sampled_from(["nothing", "optimizer", "all"]))
        holders = sorted(draw(st.sets(ranks, min_size=1)))
        parts = tuple(
            PartRecord(
                rank=rank,
                weights=file_of(f"model-{name}.rank-{rank}") if in_parts == "all" else None,
                optimizer=file_of(f"optimizer/{name}.rank-{rank}"),
            )
            for rank in holders
        )
        is_whole = in_parts == "nothing"
        step = draw(st.sampled_from([10, STEP]))
        record = LayerRecord(
            name=name,
            kind="block",
            stack="layers",
            index=index,
            step=step,
            save_index=1 if step == STEP else 0,
            update_count=7,
            reason="strategy",
            drift=None,
            weights=None if in_parts == "all" else file_of(f"model-{name}"),
            optimizer=file_of(f"optimizer/{name}") if is_whole else None,
            parts=() if is_whole else parts,
        )
        layers.append(record)
        owners.append(draw(ranks))
    writers = {f"small-{number}": draw(ranks) for number in range(draw(st.integers(0, 4)))}
    whole = fake_manifest(
        STEP,
        layers,
        save_index=1,
        world=World(size=size, sharding="sharded", layout=digest_of(b"layout")),
        tensors=tuple(fake_tensor(name) for name in names),
        optimizers=(fake_optimizer(names),),
        files=tuple(file_of(path) for path in sorted(writers)),
    )
    own = {rank: restrict(whole, rank, owners, writers) for rank in range(size)}
    return Ballot(whole=whole, own=own, votes={rank: vote_of(rank, own[rank]) for rank in range(size)})


def judge_all(votes: dict[int, Vote], size: int) -> Fault | None:
    return judge(votes[0], votes, size=size, waited_secs=3.0)


@few
@given(ballots())
def test_good_votes_make_the_manifest_of_a_single_process(found: Ballot) -> None:
    assert judge_all(found.votes, len(found.votes)) is None
    # A rank's own description was never checked: it is no whole checkpoint.
    own = Manifest.model_construct(**{name: getattr(found.own[0], name) for name in Manifest.model_fields})
    merged = merge_votes(own, found.votes)
    assert merged == found.whole
    assert encode_manifest(merged) == encode_manifest(found.whole)


@few
@given(ballots())
def test_votes_come_through_the_mail_unchanged(found: Ballot) -> None:
    for vote in found.votes.values():
        assert decode_message(Vote, encode_message(vote)) == vote


DIFFERENCES = {
    "store": "/runs/b",
    "step": STEP + 1,
    "parent": None,
    "schema_digest": digest_of(b"another model"),
    "choice": digest_of(b"another choice"),
}


@few
@given(ballots(), st.data())
def test_every_disagreement_of_every_rank_is_found(found: Ballot, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, len(found.votes) - 1))
    for field, value in DIFFERENCES.items():
        other = found.votes[rank].model_copy(update={field: value})
        fault = judge_all(found.votes | {rank: other}, len(found.votes))
        assert fault is not None
        assert fault.kind == "ranks-disagree"
        assert f"rank {rank} (host-{rank}, process {1000 + rank})" in fault.text
        assert repr(value) in fault.text
        assert repr(getattr(found.votes[0], field)) in fault.text


@few
@given(ballots(), st.data())
def test_disagreement_is_a_fault_whoever_differs(found: Ballot, data: st.DataObject) -> None:
    differing = data.draw(st.sets(st.sampled_from(sorted(found.votes)), min_size=1, max_size=len(found.votes) - 1))
    field = data.draw(st.sampled_from(sorted(DIFFERENCES)))
    votes = {
        rank: vote.model_copy(update={field: DIFFERENCES[field]}) if rank in differing else vote
        for rank, vote in found.votes.items()
    }
    fault = judge_all(votes, len(votes))
    assert fault is not None
    assert fault.kind == "ranks-disagree"


@few
@given(ballots(), st.data())
def test_absent_ranks_are_named(found: Ballot, data: st.DataObject) -> None:
    absent = data.draw(st.sets(st.integers(1, len(found.votes) - 1), min_size=1))
    votes = {rank: vote for rank, vote in found.votes.items() if rank not in absent}
    fault = judge_all(votes, len(found.votes))
    assert fault is not None
    assert fault.kind == "rank-late"
    assert f"rank {', '.join(map(str, sorted(absent)))} did not finish its part within 3 s" in fault.text


@few
@given(ballots(), st.data())
def test_failed_ranks_are_named_and_what_they_lost(found: Ballot, data: st.DataObject) -> None:
    ranks = sorted(data.draw(st.sets(st.sampled_from(sorted(found.votes)), min_size=1)))
    votes = dict(found.votes)
    for rank in ranks:
        changes = {"error": f"disk {rank} is full", "lost": (f"layers.{rank}",)}
        votes[rank] = vote_of(rank, found.own[rank], layers=(), files=(), schema_digest="", **changes)
    # Whoever failed differs in everything, and others may not have come at all: what failed is said.
    absent = data.draw(st.sets(st.sampled_from(sorted(votes)))) - {0, *ranks}
    fault = judge_all({rank: vote for rank, vote in votes.items() if rank not in absent}, len(votes))
    assert fault is not None
    assert fault.kind == "rank-failed"
    for rank in ranks[:3]:
        assert f"rank {rank} (host-{rank}, process {1000 + rank}) failed: disk {rank} is full" in fault.text
    assert (f"and {len(ranks) - 3} more" in fault.text) == (len(ranks) > 3)
    assert fault.lost == tuple(sorted(f"layers.{rank}" for rank in ranks))


@few
@given(ballots(), st.data())
def test_file_that_two_ranks_claim_is_refused(found: Ballot, data: st.DataObject) -> None:
    owner, thief = data.draw(st.permutations(sorted(found.votes)))[:2]
    vote, other = found.votes[owner], found.votes[thief]
    claimed = [file for layer in vote.layers for file in layer.files if not layer.parts] + list(vote.files)
    for file in claimed:
        theft = other.model_copy(update={"files": (*other.files, file)})
        fault = judge_all(found.votes | {thief: theft}, len(found.votes))
        assert fault is not None
        assert fault.kind == "ranks-disagree"
        assert file.path in fault.text
        assert vote.name in fault.text
        assert other.name in fault.text


@few
@given(ballots(), st.data())
def test_part_of_another_rank_is_refused(found: Ballot, data: st.DataObject) -> None:
    thief, owner = data.draw(st.permutations(sorted(found.votes)))[:2]
    parts = (PartRecord(rank=owner, weights=None, optimizer=file_of("optimizer/other")),)
    layer = found.whole.layers[0].model_copy(update={"weights": None, "optimizer": None, "parts": parts})
    theft = found.votes[thief].model_copy(update={"layers": (layer,)})
    fault = judge_all(found.votes | {thief: theft}, len(found.votes))
    assert fault is not None
    assert f"{theft.name} claims the part of another rank of layer {layer.name!r}" in fault.text


@few
@given(ballots(), st.data())
def test_a_file_that_nobody_wrote_makes_no_manifest(found: Ballot, data: st.DataObject) -> None:
    layer = data.draw(st.sampled_from(found.whole.layers))
    nothing = layer.model_copy(update={"weights": None, "optimizer": None, "parts": (), "update_count": None})

    def without(layers: tuple[LayerRecord, ...]) -> tuple[LayerRecord, ...]:
        return tuple(nothing if each.name == layer.name else each for each in layers)

    own = found.own[0].model_copy(update={"layers": without(found.own[0].layers)})
    votes = {
        rank: vote.model_copy(update={"layers": tuple(each for each in without(vote.layers) if each.files)})
        for rank, vote in found.votes.items()
    }
    with pytest.raises(ValidationError, match="has no weights"):
        merge_votes(own, votes)


@few
@given(ballots())
def test_verdict_gives_a_rank_all_it_plans_with(found: Ballot) -> None:
    verdict = Verdict(step=STEP, error=None, parent_step=STEP, parent="x", layers=summarize(found.whole))
    verdict = decode_message(Verdict, encode_message(verdict))
    for own in found.own.values():
        known = apply_verdict(own, verdict)
        for layer, whole, before in zip(known.layers, found.whole.layers, own.layers, strict=True):
            assert (layer.name, layer.step, layer.save_index) == (whole.name, whole.step, whole.save_index)
            assert (layer.update_count, layer.reason) == (whole.update_count, whole.reason)
            assert layer.files == before.files


@few
@given(ballots())
def test_schema_digest_tells_what_must_be_the_same(found: Ballot) -> None:
    """Not who wrote which file, but every tensor, hyper-parameter and cut."""
    digests = {digest_schema(own) for own in found.own.values()}
    assert digests == {digest_schema(found.whole)}
    changes: list[dict[str, Any]] = [
        {"run_id": "1" * 32},
        {"contents": "weights"},
        {"tensors": tuple(each.model_copy(update={"shape": (4,)}) for each in found.whole.tensors)},
        {"tensors": (*found.whole.tensors[::-1], fake_tensor("more"))},
        {"optimizers": ()},
        {"world": World(size=8, sharding="sharded", layout=digest_of(b"cut elsewhere"))},
    ]
    others = [digest_schema(found.whole.model_copy(update=each)) for each in changes]
    assert len({*digests, *others}) == 1 + len(changes)


# ---- Messages that are none ----

GOOD = encode_message(Verdict(step=1, error=None, parent_step=None, parent=None))


def pack(content: Any) -> bytes:
    return zlib.compress(json.dumps(content).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 64,
        GOOD[:-1],
        GOOD[1:],
        GOOD + b"x",
        zlib.compress(b"{"),
        zlib.compress(b"\xff\xfe"),
        pack([]),
        pack({"step": 1}),
        pack({"step": "1", "error": None, "parent_step": None, "parent": None}),
        pack({"step": 1, "error": None, "parent_step": None, "parent": None, "more": 1}),
        zlib.compress(b"[" * 1_000_000),
        zlib.compress(b'{"step": 1e400, "error": null, "parent_step": null, "parent": null}'),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError) as caught:
        decode_message(Verdict, data)
    assert caught.value.kind == "rank-message"


def test_message_that_unpacks_to_gigabytes_is_refused_without_unpacking_it() -> None:
    packer = zlib.compressobj()
    bomb = b"".join([*(packer.compress(bytes(2**20)) for _ in range(1024)), packer.flush()])
    with pytest.raises(FormatError, match="no verdict") as caught:
        decode_message(Verdict, bomb)
    assert "too large" in str(caught.value)


@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode_message(Vote, data)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 7))
def test_flipped_bit_is_refused_or_harmless(at: int, bit: int) -> None:
    changed = bytearray(GOOD)
    changed[at] ^= 1 << bit
    try:
        found = decode_message(Verdict, bytes(changed))
    except FormatError:
        return
    assert found == decode_message(Verdict, GOOD)  # zlib's header has bits that say nothing


# ---- Texts ----


@pytest.mark.parametrize("kind", ["rank-failed", "rank-late", "ranks-disagree"])
def test_fault_becomes_the_error_of_the_save(kind: str) -> None:
    error = Fault(kind=kind, text="x" * 10_000).to_error(7)
    assert type(error) is WriteError
    assert error.kind == kind
    assert error.what.startswith("checkpoint-7 was not published: xxx")
    assert len(error.what) == 2000
    assert error.hint


@pytest.mark.parametrize(
    ("text", "line"),
    [("", ""), ("a\nb", "a"), ("a\udcff", "a\\udcff"), ("é" * 2000, "é" * 1000), (ValueError(), "")],
)
def test_first_line_goes_into_a_message(text: object, line: str) -> None:
    assert to_line(text) == line
    Verdict(step=1, error=to_line(text), parent_step=None, parent=None).model_dump_json()


def test_stray_is_told_from_a_rank_that_tried_again() -> None:
    own = Whereabouts(key="save/5-0", step=5, name="rank 0")
    assert "rank 1 saves checkpoint-6, rank 0 checkpoint-5" in say_elsewhere(
        own, Whereabouts(key="save/6-0", step=6, name="rank 1")
    )
    text = say_elsewhere(own, Whereabouts(key="save/5-1", step=5, name="rank 1"))
    assert "another number of times: rank 1 and rank 0" in text
