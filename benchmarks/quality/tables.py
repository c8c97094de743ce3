"""The summary's numbers as Markdown, and nothing but the summary's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]

_STRATEGIES = {
    "full": "`full`",
    "parity": "`parity`",
    "filter": "`filter(1, 1, 5)`",
    "top_drift": "half, by drift",
    "top_adam": "half, by Adam's weight",
    "round_robin": "`round_robin(20)`",
    "round_robin_10": "`round_robin(10)`",
    "top_k": "`top_k(2)`",
    "budget": "`budget(0.5)`",
    "budget_per_step": "`budget_per_step`",
    "budget_per_step_free": "`budget_per_step`, no layer always",
    "drift": "`drift`, a threshold",
    "monitored": "`monitored`, a threshold",
}


def make_tables(rows: Row) -> str:
    """All tables and the lines between them."""
    settings = rows["settings"]
    saved = [row for row in rows["one_failure"] if row["strategy"] in _STRATEGIES]
    at_interval = [row for row in saved if row["interval"] == settings["interval"]]
    at_bytes = [row for row in saved if row["strategy"] == "full" or row["interval"] != settings["interval"]]
    parts = [
        _describe(rows),
        f"**One failure, a save every {settings['interval']} steps.**",
        _table(rows, at_interval),
        f"**One failure, at most about the bytes per step of `full` every {settings['interval']} steps.**",
        _table(rows, at_bytes),
        f"**{len(settings['failure_steps'])} failures in one run**, at steps "
        f"{', '.join(map(str, settings['failure_steps']))}, a save every {settings['interval']} steps. "
        "Difference of the validation loss at the end.",
        _table_of_several(rows),
        "**What to read them by.**",
        _table_of_references(rows),
    ]
    return "\n\n".join(parts) + "\n"


def _describe(rows: Row) -> str:
    settings = rows["settings"]
    regimes = "; ".join(f"{regime['name']}: {regime['title']}" for regime in settings["regimes"])
    return (
        f"{rows['parameters']:,} parameters, seeds {', '.join(map(str, settings['seeds']))}, mean and standard "
        f"deviation over seeds. {regimes}. {rows['cpu_minutes']} minutes of one core.{_describe_references(rows)}"
    )


def _describe_references(rows: Row) -> str:
    names = [
        name
        for name in _names(rows)
        if any(row["regimes"][name]["references"] != "of the seed" for row in rows["one_failure"])
    ]
    if not names:
        return ""
    return f" {' and '.join(names)}: the references of some seed do not ascend, so steps are read by their means."


def _names(rows: Row) -> list[str]:
    return [regime["name"] for regime in rows["settings"]["regimes"]]


def _lay_out(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines])


def _table(rows: Row, chosen: list[Row]) -> str:
    names = _names(rows)
    header = ["strategy", "rest", "every", "bytes per step", *(f"{name}: steps lost" for name in names)]
    header += [f"{name}: cost of a failure" for name in names]
    lines = [
        [
            _STRATEGIES[row["strategy"]],
            "" if row["strategy"] == "full" else row["rest"],
            str(row["interval"]),
            _share(row, names),
            *(_lost(row["regimes"][name]) for name in names),
            *(_number(row["regimes"][name].get("expected_cost"), "{:.2f}") for name in names),
        ]
        for row in chosen
    ]
    return _lay_out(header, lines)


def _table_of_several(rows: Row) -> str:
    names = _names(rows)
    lines = [
        [
            _STRATEGIES[row["strategy"]],
            row["rest"],
            _share(row, names),
            *(_spread(row["regimes"][name], "difference_at_end", "{:+.5f}", "{:.5f}") for name in names),
        ]
        for row in rows["several_failures"]
    ]
    return _lay_out(["strategy", "rest", "bytes per step", *names], lines)


def _table_of_references(rows: Row) -> str:
    names = _names(rows)
    lines = []
    for row, text in _references(rows):
        cells = [text]
        for name in names:
            regime = row["regimes"][name]
            cells.append(_spread(regime, "difference_at_restore", "{:+.5f}", "{:.5f}"))
            cells.append(_spread(regime, "difference_at_end", "{:+.5f}", "{:.5f}"))
        lines.append(cells)
    header = ["restored", *(f"{name}: {when}" for name in names for when in ("at once", "at the end"))]
    return _lay_out(header, lines)


def _references(rows: Row) -> Iterator[tuple[Row, str]]:
    texts: dict[str, Callable[[Row], str]] = {
        "noise": lambda row: "weights off by 1e-6",
        "stale": lambda row: f"everything {row['interval']} steps stale",
    }
    for row in rows["one_failure"]:
        if row["strategy"] in texts:
            yield row, texts[row["strategy"]](row)


def _share(row: Row, names: list[str]) -> str:
    """Of all regimes, or of each where they differ."""
    shares = [_number(row["regimes"][name]["share_of_bytes"], "{:.3f}") for name in names]
    return shares[0] if len(set(shares)) == 1 else " / ".join(shares)


def _lost(regime: Row) -> str:
    if regime["is_identical"]:
        return "0, bit for bit"
    return _spread(regime, "steps_lost", "{:.2f}", "{:.2f}")


def _spread(regime: Row, key: str, form: str, form_of_sd: str) -> str:
    text = _number(regime[key], form)
    sd = regime[f"{key}_sd"]
    return text if sd is None else f"{text} +- {form_of_sd.format(sd)}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value or 0.0)  # no minus before a zero
