"""The report for people: both runs side by side, the story of the crash, and what it does not show."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table

from ..reports.tables import cell, facts_table, heading, line, plain_table
from ..reports.units import format_bytes, format_number_of
from .report import CrashReport, DemoReport, StaleLayer, join_names

__all__ = ["crash_facts", "report_tables"]


def report_tables(report: DemoReport) -> Iterator[RenderableType]:
    """All of it, in order."""
    yield heading(
        f"{report.num_parameters / 1e6:.1f} M parameters, {report.steps} steps, a save every {report.save_steps}; "
        f"{report.wall_secs:.0f} s in all"
    )
    yield _runs_table(report)
    yield line("  * median, without the first save, which is full in both", "dim")
    yield heading("The crash")
    yield facts_table(crash_facts(report))
    yield heading("What it does not show")
    for sentence in _caveats(report):
        yield line(f"  {sentence}")
    yield heading("Where it is")
    yield facts_table(_places(report))


def _runs_table(report: DemoReport) -> Table:
    full, other = report.reference, report.recovered
    table = plain_table("", f">{full.strategy}, uninterrupted", f">{other.strategy}, killed and resumed")

    def add(name: str, of_full: str, of_other: str, style: str = "") -> None:
        table.add_row(cell(f"  {name}"), cell(of_full), cell(of_other), style=style)

    add("saves", str(full.num_saves), str(other.num_saves))
    add("bytes per save *", format_bytes(full.save_nbytes), format_bytes(other.save_nbytes))
    add("share of full", "100 %", f"{report.share * 100:.0f} %", "bold")
    add("time per save *", _milliseconds(full.save_secs), _milliseconds(other.save_secs))
    if full.stall_secs < full.save_secs or other.stall_secs < other.save_secs:
        add("training waits *", _milliseconds(full.stall_secs), _milliseconds(other.stall_secs))
    if full.failed_saves or other.failed_saves:
        add("failed saves", str(full.failed_saves), str(other.failed_saves), "red")
    add("steps lost", "0", str(report.crash.lost_steps))
    add("validation loss", f"{full.validation_loss:.4f}", f"{other.validation_loss:.4f}")
    add("difference", "", f"{report.validation_difference:+.4f}", "bold")
    return table


def crash_facts(report: DemoReport) -> Iterator[tuple[str, str]]:
    """The kill and the resume, as names and sentences."""
    crash = report.crash
    if crash.missed_steps:
        steps = ", ".join(map(str, crash.missed_steps))
        yield "missed", f"the save of step {steps} was published before the kill; resumed, and tried at the next"
    yield "killed", f"SIGKILL after step {crash.killed_at_step}, in the middle of saving step {crash.save_step}"
    swept = "the resumed run swept it" if crash.debris_was_swept else "STILL THERE after the resume"
    yield (
        "debris",
        f"{format_number_of(crash.debris_files, 'file')}, {format_bytes(crash.debris_nbytes)}, in staging, "
        f"never visible as a checkpoint; {swept}",
    )
    yield (
        "verified",
        f"all {crash.verified_after_kill} published checkpoints right after the kill, "
        f"all {report.verified_checkpoints} of both runs at the end",
    )
    lost = format_number_of(crash.lost_steps, "step")
    yield "resumed", f"from checkpoint-{crash.resumed_step}, without a merge; {lost} lost and trained again"
    yield "stale layers", _describe_stale(crash)


def _describe_stale(crash: CrashReport) -> str:
    if not crash.stale_layers:
        return f"none of {crash.num_layers}: all were saved at step {crash.resumed_step}"

    def step_of(layer: StaleLayer) -> int:
        return layer.step

    parts = [
        f"{join_names(layer.layer for layer in layers)} of step {step}"
        for step, layers in groupby(sorted(crash.stale_layers, key=step_of, reverse=True), key=step_of)
    ]
    return f"{len(crash.stale_layers)} of {crash.num_layers}: {'; '.join(parts)}"


def _caveats(report: DemoReport) -> Iterator[str]:
    oldest = max((layer.staleness for layer in report.crash.stale_layers), default=0)
    if oldest:
        yield (
            f"The checkpoint resumed from is a composite: some layers are {oldest} steps older than the others, so "
            "training never was in that state."
        )
    yield "One seed, one tiny model: recovery works; how much a composite costs your model is for you to measure."


def _places(report: DemoReport) -> Iterator[tuple[str, str]]:
    yield "picture", report.plot
    yield "details", f"{report.output}  (report.json, logs{', checkpoints' if report.has_checkpoints else ''})"
    if report.has_checkpoints:
        yield "look inside", f"llmtailor ls {shlex.quote(str(Path(report.output) / 'recovered'))}"
        yield "remove", f"rm -r {shlex.quote(report.output)}"


def _milliseconds(secs: float) -> str:
    return f"{secs * 1e3:.0f} ms"
