from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from llmtailor.demo.events import Event, FinishedEvent, LossEvent, ReadyEvent
from llmtailor.demo.options import DemoOptions
from llmtailor.demo.plot import draw_losses, loss_differences
from llmtailor.demo.process import Debris, Life
from llmtailor.demo.report import DemoReport, StaleLayer, join_names, summarize
from llmtailor.errors import TailorError

MakeReport = Callable[..., DemoReport]


def printed(report: DemoReport) -> str:
    console = Console(width=300)
    with console.capture() as captured:
        console.print(*report.tables(), sep="\n")
    return captured.get()


def test_saves_are_compared_without_the_first_which_is_full_in_both(make_report: MakeReport) -> None:
    report = make_report()
    assert (report.reference.num_saves, report.recovered.num_saves) == (5, 5)
    assert (report.reference.save_nbytes, report.recovered.save_nbytes) == (1000, 500)
    assert report.recovered.full_save_nbytes == report.reference.full_save_nbytes == 1000
    assert report.recovered.save_secs == 0.5
    assert report.share == 0.5


def test_lost_steps_run_from_the_resume_to_the_kill(make_report: MakeReport) -> None:
    crash = make_report().crash
    assert (crash.save_step, crash.killed_at_step, crash.resumed_step, crash.lost_steps) == (12, 12, 8, 4)
    assert crash.missed_steps == ()


def test_stale_layers_are_those_older_than_the_checkpoint(make_report: MakeReport) -> None:
    crash = make_report().crash
    assert crash.num_layers == 4
    assert crash.stale_layers == (
        StaleLayer(layer="embed_tokens", step=4, staleness=4),
        StaleLayer(layer="layers.1", step=4, staleness=4),
    )


def test_validation_difference_is_recovered_minus_reference(make_report: MakeReport) -> None:
    assert make_report().validation_difference == 0.125


def test_save_that_beat_the_kill_is_told(make_report: MakeReport) -> None:
    losses = [LossEvent(step=step, loss=1.0) for step in range(1, 9)]
    events: tuple[Event, ...] = (ReadyEvent(num_parameters=7), *losses)
    beaten = Debris(step=8, directory="run/_staging/8-cd", num_files=0, nbytes=0, was_published=True)
    report = make_report(Life(events=events, killed=beaten))
    assert report.crash.missed_steps == (8,)
    assert len(report.recovered.losses) == 3
    assert "the save of step 8 was published before the kill" in printed(report)


def test_too_few_saves_are_a_typed_error(lives: list[Life]) -> None:
    poor = Life(events=(ReadyEvent(num_parameters=7), FinishedEvent(validation_loss=1.0)), killed=None)
    with pytest.raises(TailorError) as caught:
        summarize(
            DemoOptions(),
            poor,
            lives,
            verified_after_kill=0,
            debris_was_swept=True,
            verified_checkpoints=0,
            wall_secs=0,
            output="",
            plot="",
            has_checkpoints=False,
        )
    assert caught.value.kind == "demo-too-few-saves"


def test_tables_say_what_happened_and_what_it_does_not_show(make_report: MakeReport) -> None:
    text = printed(make_report())
    for sentence in (
        "full, uninterrupted",
        "parity, killed and resumed",
        "50 %",
        "+0.1250",
        "SIGKILL after step 12, in the middle of saving step 12",
        "3 files, 300 B, in staging, never visible as a checkpoint; the resumed run swept it",
        "all 2 published checkpoints right after the kill, all 7 of both runs at the end",
        "from checkpoint-8, without a merge; 4 steps lost",
        "2 of 4: embed_tokens, layers.1 of step 4",
        "a composite: some layers are 4 steps older",
        "One seed, one tiny model",
        "llmtailor ls 'out put/recovered'",
    ):
        assert sentence in text


def test_tables_do_not_hide_debris_that_stayed(make_report: MakeReport) -> None:
    assert "STILL THERE" in printed(make_report(debris_was_swept=False))


def test_tables_do_not_point_to_checkpoints_that_are_gone(make_report: MakeReport) -> None:
    assert "llmtailor ls" not in printed(make_report(has_checkpoints=False))


def test_record_is_json(make_report: MakeReport) -> None:
    record = json.loads(json.dumps(make_report().record(), allow_nan=False))
    assert record["crash"]["lost_steps"] == 4
    assert record["recovered"]["losses"][1][0] == {"step": 9, "loss": pytest.approx(5 / 9 + 0.5)}


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["norm"], "norm"),
        (["embed_tokens", "layers.1", "layers.3", "lm_head"], "embed_tokens, layers.1/3, lm_head"),
        (["vision.layers.0", "text.layers.0"], "vision.layers.0, text.layers.0"),
    ],
)
def test_numbered_layers_share_the_name_of_their_stack(names: list[str], text: str) -> None:
    assert join_names(names) == text


def test_difference_is_drawn_from_the_resume_on(make_report: MakeReport) -> None:
    differences = loss_differences(make_report())
    assert [step for step, _ in differences] == list(range(9, 21))
    assert [difference for _, difference in differences] == [pytest.approx(0.5)] * 12


def test_plot_is_a_png(make_report: MakeReport, tmp_path: Path) -> None:
    draw_losses(make_report(), tmp_path / "loss.png")
    content = (tmp_path / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) > 10_000
