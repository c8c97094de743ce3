from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from faults import LAYERS, fake_manifest, fake_record
from llmtailor.checkpoint import Checkpoint, describe_layers, expected_loss_steps, summarize_steps
from llmtailor.manifest import EncodingRecord, ErrorRecord, FileRecord, LayerRecord
from llmtailor.writer import WrittenLayer

DIGEST = "xxh3_128:" + "0123456789abcdef" * 2
ERRORS = {"weights": 2.096e-05, "first": 0.00601, "second": 0.0228}


def file(path: str) -> FileRecord:
    return FileRecord(path=path, bytes=4096, digest=DIGEST)


def exact(name: str, step: int) -> LayerRecord:
    weights, optimizer = file(f"model-{name}.safetensors"), file(f"optimizer/{name}.safetensors")
    return fake_record(name, step, 0, WrittenLayer(weights=weights, optimizer=optimizer, update_count=step))


def coded(
    name: str, step: int, *, exact_step: int | None = None, errors: dict[str, float] = ERRORS, **changes: Any
) -> LayerRecord:
    """A layer whose state is in codes; without an exact step they are those of ``compact``."""
    is_relative = exact_step is not None
    fields: dict[str, Any] = {
        "step": step,
        "save_index": 0,
        "update_count": step,
        "rest": "q8" if is_relative else "compact",
        "base": "exact" if is_relative else "rounded",
        "codes": file(f"codes/{name}.safetensors"),
        "errors": {component: ErrorRecord(l2=l2, max=l2) for component, l2 in errors.items()},
    }
    encoding = EncodingRecord(**(fields | changes))
    plain = exact(name, step if exact_step is None else exact_step)
    left = {} if is_relative else {"optimizer": None, "update_count": None}
    return plain.model_copy(update={"reason": "coded", "encoding": encoding, **left})


def describe(step: int, layers: Sequence[LayerRecord], **changes: Any) -> list[str]:
    """The lines of the resume report but its first."""
    manifest = fake_manifest(step, layers, **changes)
    first, *lines = describe_layers(Checkpoint(path=Path("run/x"), manifest=manifest, digest=DIGEST)).splitlines()
    assert first == f"resuming from run/x (step {step})"
    return lines


def described_codes(**changes: Any) -> str:
    """What the report says in parentheses of a checkpoint of step 400 that is one layer as codes."""
    (line,) = describe(400, [coded("norm", 400, **changes)])
    return line.removeprefix("  step     400 (newest, ").removesuffix("): norm")


def test_exact_layers_are_told_by_step() -> None:
    layers = [exact("embed_tokens", 400), *(exact(f"layers.{index}", 400) for index in range(4)), exact("norm", 300)]
    assert describe(400, layers) == [
        "  step     400 (newest): embed_tokens, layers.0-3",
        "  step     300 (100 steps old): norm",
        "  about 16.7 steps of progress are lost (mean age of the layers, weighted by size)",
    ]


def test_what_a_resume_loses_is_weighted_by_what_layers_matter() -> None:
    layers = [
        exact("embed_tokens", 400).model_copy(update={"share": 0.75, "drift": 0.5}),
        exact("layers.0", 300).model_copy(update={"share": 0.2, "drift": 0.021}),
        exact("norm", 300).model_copy(update={"share": 0.05, "drift": 0.004}),
    ]
    assert describe(400, layers) == [
        "  step     400 (newest): embed_tokens",
        "  step     300 (100 steps old, drift 0.4 % to 2.1 %): layers.0, norm",
        "  about 25 steps of progress are lost (mean age of the layers, weighted by importance)",
    ]


def test_nothing_is_lost_by_layers_in_codes_of_the_newest_step() -> None:
    assert expected_loss_steps(fake_manifest(400, [coded("norm", 400, exact_step=200), exact("layers.0", 400)])) == 0


def test_blocks_are_joined_where_they_follow_each_other() -> None:
    names = ("layers.0", "layers.1", "norm", "layers.2", "layers.3", "layers.5", "layers.7", "layers.8")
    assert describe(9, [exact(name, 9) for name in names]) == [
        "  step       9 (newest): layers.0-1, norm, layers.2-3, layers.5, layers.7-8"
    ]


def test_blocks_are_joined_over_those_that_are_something_else() -> None:
    layers = [exact(f"layers.{index}", 9) if index % 3 else coded(f"layers.{index}", 9) for index in range(6)]
    (group, codes) = summarize_steps(fake_manifest(9, layers))
    assert (group.names, codes.names) == (("layers.1-2", "layers.4-5"), ("layers.0", "layers.3"))


def test_codes_are_told_apart_with_policy_age_of_the_exact_version_and_error() -> None:
    even = [exact(f"layers.{index}", 400) for index in (0, 2)]
    odd = [coded(f"layers.{index}", 400, exact_step=300) for index in (1, 3)]
    assert describe(400, [even[0], odd[0], even[1], odd[1]]) == [
        "  step     400 (newest): layers.0, layers.2",
        "  step     400 (newest, as q8 codes, exact 100 steps ago; weights within 2.1e-05, moments 0.6 %, 2.3 %): "
        "layers.1, layers.3",
    ]


def test_codes_that_were_kept_are_as_old_as_they_are() -> None:
    layers = [coded("norm", 300, exact_step=200), exact("layers.0", 300)]
    assert describe(400, layers) == [
        "  step     300 (100 steps old): layers.0",
        "  step     300 (100 steps old, as q8 codes, exact 200 steps ago; weights within 2.1e-05, "
        "moments 0.6 %, 2.3 %): norm",
        "  about 100 steps of progress are lost (mean age of the layers, weighted by size)",
    ]


def test_the_worst_error_of_a_component_stands_for_all_layers() -> None:
    layers = [
        coded("layers.0", 400, exact_step=300, errors={"weights": 1e-05, "first": 0.02}),
        coded("layers.1", 400, exact_step=300, errors={"weights": 3e-05, "first": 0.01, "second": 0.03}),
    ]
    (group,) = summarize_steps(fake_manifest(400, layers))
    assert group.errors == {"weights": 3e-05, "first": 0.02, "second": 0.03}
    assert "weights within 3e-05, moments 2 %, 3 %): layers.0-1" in describe(400, layers)[0]


def test_the_ages_of_exact_versions_are_told_from_the_youngest_to_the_oldest() -> None:
    layers = [coded(f"layers.{index}", 400, exact_step=step) for index, step in enumerate((300, 100, 200))]
    (line,) = describe(400, layers)
    assert "(newest, as q8 codes, exact 100 to 300 steps ago; " in line


def test_an_exact_version_of_the_step_before_is_one_step_old() -> None:
    assert described_codes(exact_step=399).startswith("as q8 codes, exact 1 step ago; ")


def test_codes_of_two_policies_are_told_apart() -> None:
    layers = [coded("layers.0", 400, exact_step=300), coded("layers.1", 400), coded("norm", 400, exact_step=300)]
    assert [(group.rest, group.names, group.exact_steps) for group in summarize_steps(fake_manifest(400, layers))] == [
        ("compact", ("layers.1",), ()),
        ("q8", ("layers.0", "norm"), (300,)),
    ]


def test_codes_without_an_exact_version_say_nothing_of_its_age() -> None:
    assert described_codes() == "as compact codes; weights within 2.1e-05, moments 0.6 %, 2.3 %"


def test_a_policy_in_full_is_not_called_codes_twice() -> None:
    rest = "codes(weights=tail4, first=exact, second=log4)"
    assert described_codes(rest=rest).startswith(f"as {rest}; weights within")


@pytest.mark.parametrize(
    ("errors", "told"),
    [
        ({}, "weights exact, moments exact"),
        ({"weights": 0.0123}, "weights within 0.012, moments exact"),
        ({"first": 0.00567}, "weights exact, first moments 0.57 %"),
        ({"second": 0.12345}, "weights exact, second moments 12 %"),
        ({"weights": 1e-7, "first": 1.2345, "second": 2e-5}, "weights within 1e-07, moments 123 %, 0.002 %"),
    ],
)
def test_components_that_are_exact_are_called_so(errors: dict[str, float], told: str) -> None:
    assert described_codes(errors=errors) == f"as compact codes; {told}"


def test_codes_in_a_checkpoint_of_weights_say_nothing_of_moments() -> None:
    layer = coded("norm", 9, errors={"weights": 0.001}, update_count=None)
    (line,) = describe(9, [layer], contents="weights", optimizers=())
    assert line == "  step       9 (newest, as compact codes; weights within 0.001): norm"


def test_the_report_of_a_hundred_layers_is_short() -> None:
    """As ``round_robin(n=20)`` leaves them: five are exact, the others had their turns at 19 saves before."""
    blocks = [
        exact(f"layers.{index}", 2000)
        if index % 20 == 7
        else coded(f"layers.{index}", 2000, exact_step=2000 - 100 * ((7 - index) % 20))
        for index in range(100)
    ]
    assert describe(2000, blocks) == [
        "  step    2000 (newest): layers.7, layers.27, layers.47, layers.67, layers.87",
        "  step    2000 (newest, as q8 codes, exact 100 to 1900 steps ago; weights within 2.1e-05, "
        "moments 0.6 %, 2.3 %): layers.0-6, layers.8-26, layers.28-46, layers.48-66, layers.68-86, layers.88-99",
    ]


def test_steps_come_newest_first_and_exact_layers_before_codes() -> None:
    layers = [
        coded(LAYERS[0], 30, exact_step=10),
        exact(LAYERS[1], 20),
        exact(LAYERS[2], 30),
        coded(LAYERS[3], 20, exact_step=10),
    ]
    assert [(group.step, group.rest) for group in summarize_steps(fake_manifest(30, layers))] == [
        (30, None),
        (30, "q8"),
        (20, None),
        (20, "q8"),
    ]
