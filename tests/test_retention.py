from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faults import LAYERS, fake_layer, fake_manifest, fake_record
from llmtailor.errors import InvalidInputError
from llmtailor.manifest import EncodingRecord, FileRecord, LayerRecord, Manifest, PartRecord, World
from llmtailor.retention import Choice, Keep, Kept, choose_removals, encode_metrics, parse_keep, thin_manifest
from llmtailor.writer import WrittenLayer


def kept(text: str) -> list[Kept]:
    """``10c 20 30w 40x 50=0.5``: step 10 is consistent, 30 has weights alone, 40 cannot be thinned, 50 has a metric."""
    found = []
    for word in text.split():
        step, _, metric = word.partition("=")
        found.append(
            Kept(
                step=int(step.rstrip("cwx")),
                is_consistent="c" in step,
                has_optimizer="w" not in step,
                can_thin="w" not in step and "x" not in step,
                metric=float(metric) if metric else None,
            )
        )
    return found


# A limit


LIMITS = [
    # checkpoints          limit pinned  removed
    ("", 1, (), ()),
    ("10", 1, (), ()),
    ("10 20 30", None, (), ()),
    ("10 20 30", 0, (), ()),
    ("10 20 30", -1, (), ()),
    ("10 20 30", 3, (), ()),
    ("10 20 30", 4, (), ()),
    ("10 20 30", 2, (), (10,)),
    ("10 20 30", 1, (), (10, 20)),
    ("30 10 20", 2, (), (10,)),
    ("10c 20 30", 2, (), (20,)),
    ("10c 20 30", 1, (), (20,)),
    ("10c 20c 30", 1, (), (10,)),
    ("10c 20c 30c", 1, (), (10, 20)),
    ("10c 20 30 40", 3, (), (20,)),
    ("10 20 30 40", 2, (10,), (20, 30)),
    ("10 20 30 40", 1, (10, 20), (30,)),
    ("10 20 30 40", 2, (40,), (10, 20)),
    ("10c 20 30 40", 2, (20,), (30,)),
    ("10 20 30", 1, (99,), (10, 20)),
    ("0c 5 10", 2, (), (5,)),
    ("10 20 30w 40w", 1, (), (10, 30)),
    ("10c 20cw 30", 1, (), (20,)),
    ("10cw 20cw 30", 1, (), (10,)),
]


@pytest.mark.parametrize(("checkpoints", "limit", "pinned", "removed"), LIMITS)
def test_a_number_is_a_limit(
    checkpoints: str, limit: int | None, pinned: tuple[int, ...], removed: tuple[int, ...]
) -> None:
    assert choose_removals(kept(checkpoints), parse_keep(limit), pinned=pinned).removed == removed


def test_a_limit_need_not_keep_a_consistent_one() -> None:
    assert choose_removals(kept("10c 20 30"), parse_keep(2, consistent=False)).removed == (10,)


# Rules


RULES = [
    # checkpoints              rules                          stay
    ("10 20 30 40", "last=2", (30, 40)),
    ("10c 20 30 40", "last=2", (10, 30, 40)),
    ("10c 20 30 40", "last=2, consistent=no", (30, 40)),
    ("10 20 30 40", "every=20", (20, 40)),
    ("0 10 20 30", "every=20", (0, 20, 30)),
    ("10 20 30 40", "last=1, every=20, pinned=10", (10, 20, 40)),
    ("10=0.5 20=0.3 30=0.4 40=0.9", "best=2", (20, 30, 40)),
    ("10=0.5 20=0.3 30=0.4 40=0.9", "best=2, metric=accuracy", (10, 40)),
    ("10=0.5 20=0.3 30=0.4 40=0.9", "best=2, greater_is_better=true", (10, 40)),
    ("10=0.5 20=0.3 30=0.4 40", "best=1, metric=f1, greater_is_better=false", (20, 40)),
    ("10=0.5 20=0.5 30=0.5 40=0.9", "best=1", (30, 40)),
    ("10 20 30", "best=1", (10, 20, 30)),
    ("10 20 30", "last=1, best=1", (10, 20, 30)),
    ("10 20 30w", "last=1", (20, 30)),
    ("10 20 30", "optimizer=1", (10, 20, 30)),
    ("10 20 30", "pinned=10", (10, 20, 30)),
]


@pytest.mark.parametrize(("checkpoints", "rules", "stay"), RULES)
def test_a_checkpoint_stays_if_a_rule_wants_it(checkpoints: str, rules: str, stay: tuple[int, ...]) -> None:
    choice = choose_removals(kept(checkpoints), parse_keep(rules))
    assert tuple(choice.reasons) == stay
    assert choice.removed == tuple(sorted({each.step for each in kept(checkpoints)} - set(stay)))


def test_reasons_of_those_that_stay() -> None:
    found = kept("100=0.25 150 200c=0.5 300 350w 400w")
    keep = Keep(last=2, every=100, best=1)
    assert choose_removals(found, keep, pinned={150}).reasons == {
        100: ("every 100", "best 1, eval_loss 0.25"),
        150: ("pinned",),
        200: ("newest consistent", "every 100"),
        300: ("newest to resume from", "every 100"),
        350: ("last 2",),
        400: ("newest", "last 2", "every 100"),
    }
    assert choose_removals(kept("1 2 3"), Keep(limit=2)).reasons == {2: ("limit 2",), 3: ("newest",)}
    assert choose_removals(kept("1 2"), Keep()).reasons == {1: ("no rule removes it",), 2: ("newest",)}
    assert choose_removals(kept("1 2"), Keep(best=1)).reasons[1] == ("no eval_loss yet",)


# Optimizer state


THINNING = [
    # checkpoints         rules                           pinned  thinned    bound
    ("10 20 30 40", "optimizer=2", (), (10, 20), ()),
    ("10 20 30 40", "optimizer=9", (), (), ()),
    ("10 20 30 40", "last=2, optimizer=1", (), (30,), ()),
    ("10c 20 30 40", "optimizer=1", (), (20, 30), ()),
    ("10c 20 30 40", "optimizer=1, consistent=no", (), (10, 20, 30), ()),
    ("10 20 30 40", "optimizer=1", (20,), (10, 30), ()),
    ("10 20 30 40", "optimizer=1, pinned=30", (), (10, 20), ()),
    ("10w 20 30w 40", "optimizer=1", (), (20,), ()),
    ("10 20 30w 40w", "optimizer=1", (), (10,), ()),
    ("10 20x 30 40", "optimizer=1", (), (10, 30), (20,)),
    ("10 20 30 40", "last=2", (), (), ()),
    ("10=1 20=2 30=3 40=4", "best=1, optimizer=1", (), (10,), ()),
]


@pytest.mark.parametrize(("checkpoints", "rules", "pinned", "thinned", "bound"), THINNING)
def test_old_optimizer_state_goes(
    checkpoints: str, rules: str, pinned: tuple[int, ...], thinned: tuple[int, ...], bound: tuple[int, ...]
) -> None:
    choice = choose_removals(kept(checkpoints), parse_keep(rules), pinned=pinned)
    assert (choice.thinned, choice.bound) == (thinned, bound)


# Of any run and any rules


CHECKPOINTS = st.dictionaries(
    st.integers(0, 50),
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.none() | st.integers(0, 5)),
    min_size=1,
    max_size=14,
).map(
    lambda found: [
        Kept(step=step, is_consistent=consistent, has_optimizer=full, can_thin=full and thin, metric=metric)
        for step, (consistent, full, thin, metric) in found.items()
    ]
)
COUNTS = st.none() | st.integers(1, 8)
UNIONS = st.builds(
    Keep,
    last=COUNTS,
    every=st.none() | st.integers(1, 20),
    best=COUNTS,
    metric=st.sampled_from(["eval_loss", "accuracy"]),
    greater_is_better=st.none() | st.booleans(),
    optimizer=COUNTS,
    pinned=st.lists(st.integers(0, 50), max_size=2).map(tuple),
    consistent=st.booleans(),
)
RULES_OF_ALL_KINDS = UNIONS | st.builds(Keep, limit=st.integers(1, 8), optimizer=COUNTS, consistent=st.booleans())
PINNED = st.sets(st.integers(0, 50), max_size=3)


def newest(steps: list[int]) -> set[int]:
    return set(sorted(steps)[-1:])


def carry_out(checkpoints: list[Kept], choice: Choice) -> list[Kept]:
    return [
        Kept(
            step=each.step,
            is_consistent=each.is_consistent,
            has_optimizer=each.has_optimizer and each.step not in choice.thinned,
            can_thin=each.can_thin and each.step not in choice.thinned,
            metric=each.metric,
        )
        for each in checkpoints
        if each.step not in choice.removed
    ]


@given(CHECKPOINTS, RULES_OF_ALL_KINDS, PINNED)
def test_what_must_stay_stays_with_all_its_files(checkpoints: list[Kept], keep: Keep, pinned: set[int]) -> None:
    choice = choose_removals(checkpoints, keep, pinned=pinned)
    steps = [each.step for each in checkpoints]
    full = [each.step for each in checkpoints if each.has_optimizer]
    consistent = [each for each in checkpoints if each.is_consistent]
    must_stay = newest(steps) | newest(full) | ((pinned | set(keep.pinned)) & set(steps))
    if keep.consistent:
        must_stay |= newest([each.step for each in consistent if each.has_optimizer] or [s.step for s in consistent])
    assert must_stay.isdisjoint({*choice.removed, *choice.thinned, *choice.bound})
    assert must_stay <= set(choice.reasons)
    assert all(choice.reasons.values())
    if keep.limit is not None:
        assert len(choice.reasons) == min(len(steps), max(keep.limit, len(must_stay)))


@given(CHECKPOINTS, RULES_OF_ALL_KINDS, PINNED)
def test_a_choice_is_of_what_there_is(checkpoints: list[Kept], keep: Keep, pinned: set[int]) -> None:
    choice = choose_removals(checkpoints, keep, pinned=pinned)
    assert sorted([*choice.removed, *choice.reasons]) == sorted(each.step for each in checkpoints)
    for steps in (choice.removed, choice.thinned, choice.bound, tuple(choice.reasons)):
        assert list(steps) == sorted(set(steps))
    by_step = {each.step: each for each in checkpoints}
    assert set(choice.thinned) | set(choice.bound) <= set(choice.reasons)
    assert all(by_step[step].has_optimizer and by_step[step].can_thin for step in choice.thinned)
    assert all(by_step[step].has_optimizer and not by_step[step].can_thin for step in choice.bound)


@given(CHECKPOINTS, RULES_OF_ALL_KINDS, PINNED)
def test_the_newest_so_many_keep_their_optimizer_state(checkpoints: list[Kept], keep: Keep, pinned: set[int]) -> None:
    choice = choose_removals(checkpoints, keep, pinned=pinned)
    if keep.optimizer is None:
        assert (choice.thinned, choice.bound) == ((), ())
        return
    left = [each.step for each in carry_out(checkpoints, choice) if each.has_optimizer]
    full = [each.step for each in checkpoints if each.has_optimizer and each.step in choice.reasons]
    assert set(sorted(full)[-keep.optimizer :]) <= set(left)


@given(CHECKPOINTS, RULES_OF_ALL_KINDS, PINNED)
def test_what_was_chosen_once_is_chosen_for_good(checkpoints: list[Kept], keep: Keep, pinned: set[int]) -> None:
    once = carry_out(checkpoints, choose_removals(checkpoints, keep, pinned=pinned))
    again = choose_removals(once, keep, pinned=pinned)
    assert (again.removed, again.thinned) == ((), ())


@given(
    CHECKPOINTS, UNIONS, PINNED, st.integers(0, 50), st.sampled_from(["last", "every", "best", "pinned", "consistent"])
)
def test_another_rule_never_removes_more(
    checkpoints: list[Kept], keep: Keep, pinned: set[int], number: int, rule: str
) -> None:
    given_rules = {name: getattr(keep, name) for name in ("last", "every", "best", "metric", "greater_is_better")}
    if keep.removes_nothing or (rule != "pinned" and given_rules.get(rule) is not None):
        return
    more = {
        "pinned": Keep(**given_rules, consistent=False, pinned=(number,)),
        "consistent": Keep(**given_rules, consistent=True),
    }.get(rule) or Keep(**(given_rules | {rule: 1 + number}), consistent=False)
    less = Keep(**given_rules, consistent=False)
    removed = set(choose_removals(checkpoints, less, pinned=pinned).removed)
    assert set(choose_removals(checkpoints, more, pinned=pinned).removed) <= removed
    assert set(choose_removals(checkpoints, less, pinned={*pinned, number}).removed) <= removed


@given(CHECKPOINTS, RULES_OF_ALL_KINDS, PINNED)
def test_optimizer_state_has_no_say_in_what_is_removed(checkpoints: list[Kept], keep: Keep, pinned: set[int]) -> None:
    rules = {name: getattr(keep, name) for name in Keep.__dataclass_fields__ if name != "optimizer"}
    removed = choose_removals(checkpoints, Keep(**rules), pinned=pinned).removed
    assert choose_removals(checkpoints, keep, pinned=pinned).removed == removed


# As users write them


@pytest.mark.parametrize(
    ("value", "keep"),
    [
        (None, Keep()),
        (3, Keep(limit=3)),
        (0, Keep()),
        (-1, Keep()),
        ("", Keep()),
        ("3", Keep(limit=3)),
        ("0", Keep()),
        ("3, optimizer=2", Keep(limit=3, optimizer=2)),
        ("limit=3", Keep(limit=3)),
        (" last = 3 ,every=1000", Keep(last=3, every=1000)),
        ("best=2, metric=eval_acc", Keep(best=2, metric="eval_acc")),
        ("last=1, greater_is_better=No, consistent=FALSE", Keep(last=1, greater_is_better=False, consistent=False)),
        ("pinned=400/800", Keep(pinned=(400, 800))),
        (Keep(last=2), Keep(last=2)),
    ],
)
def test_parse_keep(value: Any, keep: Keep) -> None:
    assert parse_keep(value) == keep


def test_parse_keep_with_what_is_given_beside_it() -> None:
    assert parse_keep(3, consistent=False, optimizer=2) == Keep(limit=3, consistent=False, optimizer=2)
    assert parse_keep(Keep(last=1, consistent=False)) == Keep(last=1, consistent=False)
    assert parse_keep("optimizer=4", optimizer=2) == Keep(optimizer=4)
    with pytest.raises(InvalidInputError, match="optimizer makes no sense"):
        parse_keep(None, optimizer=0)


@given(RULES_OF_ALL_KINDS)
def test_text_of_rules_says_all(keep: Keep) -> None:
    assert parse_keep(keep.text) == keep


@pytest.mark.parametrize(
    "value",
    [
        True, 1.5, [3], "three", "last", "last=", "last=x", "last=-1", "last=0", "last=1.5", "last=\u0663",
        "last=2, last=3", "first=3", "3, last=2", "3, every=10", "3, best=1", "3,", "3, 4",
        "greater_is_better=maybe", "pinned=4,8", "pinned=-1", "pinned=", "metric=", "metric=eval loss",
        "last=99999999999999999999",
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_keep(value)
    assert caught.value.kind == "keep"
    assert caught.value.expected
    assert caught.value.found


@pytest.mark.parametrize(
    "rules",
    [
        {"last": 0}, {"last": True}, {"every": -5}, {"best": 1.0}, {"optimizer": 0}, {"limit": 3, "last": 2},
        {"metric": ""}, {"metric": None}, {"metric": "a,b"}, {"greater_is_better": 1}, {"consistent": None},
        {"pinned": [400]}, {"pinned": (-1,)}, {"pinned": (True,)}, {"pinned": "400"},
    ],
)  # fmt: skip
def test_rules_that_make_no_sense_are_refused(rules: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="makes no sense as a rule of what to keep"):
        Keep(**rules)


# Manifests


FILE = FileRecord(path="x", bytes=1, digest="xxh3_128:" + "0" * 32)


def record(name: str, **changes: Any) -> LayerRecord:
    layer = fake_layer(name, 10)
    files = [FILE.model_copy(update={"path": file.name, "bytes": file.nbytes}) for file in layer.files]
    written = WrittenLayer(weights=files[0], optimizer=files[1], update_count=7)
    return fake_record(name, 10, 1, written).model_copy(update=changes)


def encoding(base: str) -> EncodingRecord:
    codes = FILE.model_copy(update={"path": "codes/norm.safetensors"})
    return EncodingRecord.model_validate(
        {"step": 10, "save_index": 1, "update_count": 7, "rest": "q8", "base": base, "codes": codes, "errors": {}}
    )


def manifest(*layers: LayerRecord, **changes: Any) -> Manifest:
    return fake_manifest(10, layers, files=(FILE.model_copy(update={"path": "scheduler.pt"}),), **changes)


def test_thin_manifest_takes_away_optimizer_state_and_nothing_else() -> None:
    full = manifest(*map(record, LAYERS))
    thinned = thin_manifest(full)
    assert thinned is not None
    assert (thinned.contents, thinned.optimizers) == ("weights", ())
    assert {file.path for file in full.all_files} - {file.path for file in thinned.all_files} == {
        f"optimizer/{name}.safetensors" for name in LAYERS
    }
    assert [layer.model_copy(update={"optimizer": None, "update_count": None}) for layer in full.layers] == list(
        thinned.layers
    )
    assert full.model_copy(update={"contents": "weights", "optimizers": (), "layers": thinned.layers}) == thinned
    assert thin_manifest(thinned) is None


def test_thin_manifest_keeps_the_weights_of_parts() -> None:
    def part(rank: int, **files: str) -> PartRecord:
        records = {kind: FILE.model_copy(update={"path": path}) for kind, path in files.items()}
        return PartRecord.model_validate({"rank": rank, "weights": None, "optimizer": None, **records})

    cut = record(
        "norm",
        weights=None,
        optimizer=None,
        parts=(part(0, weights="w0", optimizer="o0"), part(1, weights="w1"), part(2, optimizer="o2")),
    )
    zero = record("layers.0", optimizer=None, parts=(part(0, optimizer="p0"), part(1, optimizer="p1")))
    world = World(size=3, sharding="sharded", layout="xxh3_128:" + "1" * 32)
    thinned = thin_manifest(manifest(cut, zero, world=world))
    assert thinned is not None
    assert thinned.layers[0].parts == (part(0, weights="w0"), part(1, weights="w1"))
    assert thinned.layers[1].parts == ()
    assert thinned.layers[1].weights == zero.weights
    assert thinned.world == world


def test_thin_manifest_takes_codes_away_that_hold_no_weights() -> None:
    coded = record("norm", optimizer=None, update_count=None, encoding=encoding("none"))
    thinned = thin_manifest(manifest(record("layers.0"), coded))
    assert thinned is not None
    assert thinned.layers[1].encoding is None
    assert "codes/norm.safetensors" not in {file.path for file in thinned.all_files}


@pytest.mark.parametrize("base", ["exact", "rounded"])
def test_thin_manifest_needs_weights_that_stand_for_themselves(base: str) -> None:
    plain = {} if base == "exact" else {"optimizer": None, "update_count": None}
    coded = record("norm", **plain, encoding=encoding(base))
    assert thin_manifest(manifest(record("layers.0"), coded)) is None


def test_encode_metrics() -> None:
    assert json.loads(encode_metrics({"eval_loss": 1, "f1": 0.5, "a": math.nan, "b": -math.inf})) == {
        "eval_loss": 1.0,
        "f1": 0.5,
    }
