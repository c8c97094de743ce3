"""Write the tables of the README and of pages under docs/ from the results; ``make bench`` runs it last."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_FORMATS = {
    "tailored": "LLMTailor",
    "hf": "HF Trainer",
    "deepspeed_zero2": "DeepSpeed ZeRO-2, 2 ranks",
    "deepspeed_zero3": "DeepSpeed ZeRO-3, 2 ranks",
    "dcp": "PyTorch DCP",
}


def make_table() -> str:
    """The table, as it has to stand in the README."""
    saves, demo, cli = (_read(question) for question in ("selective_save", "demo", "cli"))
    saved, killed, listed = saves["rows"], demo["rows"], cli["rows"]
    full, parity = saved["two_full_saves_bytes"] / 2e6, saved["two_parity_saves_bytes"] / 2e6
    publish = saved["publish_nothing_written_ms_beyond_fsync_median"]
    losses = [f"{killed[run]['validation_loss']:.3f}" for run in ("reference", "recovered")]
    size = f"{killed['num_parameters'] / 1e6:.1f} M parameters, seed {killed['seed']}"
    rows = [
        (f"on {saves['environment']['cores']} cores; figures from `benchmarks/results/`", "`full`", "`parity`"),
        ("---", "---", "---"),
        ("bytes of a save, Llama shape of 35 layers", f"{full:.1f} MB", f"{parity:.1f} MB"),
        ("a save of 35 layers that writes none of them, beyond its fsyncs", "", f"{publish:.0f} ms"),
        (
            f"steps lost by SIGKILL in mid-save, saving every {killed['save_steps']}",
            "not killed",
            str(killed["crash"]["lost_steps"]),
        ),
        (f"validation loss at the end ({size})", *losses),
        (f"`llmtailor ls` of {listed['checkpoints']} checkpoints", "", f"{listed['ls_secs_median']:.2f} s"),
    ]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)


def make_merge_table() -> str:
    """The table of merges, as it has to stand in the README."""
    rows = [
        ("merge of two checkpoints of 150 M parameters", "size", "merge", "`cp -r` + fsync", "peak memory"),
        ("---", "---", "---", "---", "---"),
    ]
    measured = _read("merge")["rows"]
    for name, title in _FORMATS.items():
        row = measured[name]
        rows.append(
            (
                title,
                f"{row['bytes'] / 1e9:.1f} GB",
                f"{row['merge_2_sources_secs_median']:.1f} s",
                f"{row['cp_and_fsync_secs_median']:.1f} s",
                f"{row['merge_2_sources_peak_mib_above_interpreter']:.0f} MiB",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def make_save_table() -> str:
    """The table of saves, as it has to stand in the README."""
    saved, stalled = _read("save")["rows"], _read("stall")["rows"]
    returned, held, training = saved["memory_returned"], saved["memory_held"], stalled["training"]

    def durable(rows: dict[str, Any]) -> list[str]:
        seconds = {
            name: f"{rows[f'{name}_secs_median']:.1f} s" for name in ("llmtailor", "torch_save", "dcp", "safetensors")
        }
        return [
            seconds["llmtailor"],
            seconds["torch_save"],
            f"{seconds['dcp']} (not async)",
            "",
            seconds["safetensors"],
        ]

    def beside(what: str, factor: float, unit: str, digits: int) -> list[str]:
        methods = ("llmtailor", "torch_save", "dcp_thread", "dcp_process")
        return [f"{training[f'{name}_{what}_secs_median'] * factor:.{digits}f} {unit}" for name in methods] + [""]

    size, state = f"{saved['bytes'] / 1e9:.1f} GB", f"{stalled['bytes'] / 1e9:.1f} GB"
    rows = [
        ("a save of a Llama with AdamW", "LLMTailor", "`torch.save`", "DCP async, thread", "process", "safetensors"),
        ("---", "---", "---", "---", "---", "---"),
        (f"durable, {size}, free memory given back in between", *durable(returned)),
        (f"durable, {size}, free memory held ready", *durable(held)),
        (f"training stands still, {state}", *beside("stall", 1e3, "ms", 0)),
        (f"training time lost, {state}", *beside("lost", 1, "s", 1)),
    ]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)


# What is written, how a run of the quality benchmark is called, its rest, and that of the bytes benchmark.
_CODED = (
    ("everything exactly: `full`", "full", "skip", "exact"),
    ("half of the layers: `parity`", "parity", "skip", None),
    ('half of the layers, the others as 8-bit codes: `parity`, `rest="q8"`', "parity", "q8", None),
    ('1/20 of them, the others as 8-bit codes: `round_robin(20)`, `rest="q8"`', "round_robin", "q8", "q8"),
    ('1/20 of them, the others as 4-bit codes: `rest="q4"`', "round_robin", "q4", "q4"),
    ('weights in BF16 and what is missing as codes: `rest="compact"`', "round_robin", "compact", "compact"),
)


def make_codes_table() -> str:
    """The table of codes, as it has to stand in the README."""
    measured, counted = _read("quality")["rows"], _read("coded_bytes")["rows"]["fp32"]
    interval = measured["settings"]["interval"]
    found = {
        (row["strategy"], row["rest"]): row["regimes"] for row in measured["one_failure"] if row["interval"] == interval
    }
    rows = [
        ("every save writes", "bytes a parameter", "steps lost, pre-training", "steps lost, fine-tuning"),
        ("---", "---", "---", "---"),
    ]
    for title, strategy, rest, name in _CODED:
        regimes = found[strategy, rest]
        share = regimes["P"]["share_of_bytes"] * counted["exact"]["save_bytes_per_parameter"]
        nbytes = counted[name]["save_bytes_per_parameter"] if name else share
        lost = [_format_lost(regimes[regime]) for regime in ("P", "F")]
        rows.append((title, f"{nbytes:.1f}", *lost))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def make_bytes_table() -> str:
    """The table of bytes, as it has to stand in docs/codes.md."""
    counted = _read("coded_bytes")["rows"]
    titles = {
        "exact": "`full`",
        "q8": "`q8`",
        "q4": "`q4`",
        "compact": "`compact`",
        "compact4": "`compact4`",
    }
    rows = [
        ("bytes a parameter", "codes", "a save", "on disk", "codes", "a save", "on disk"),
        ("---",) * 7,
        ("", "fp32", "", "", "bf16, fp32 masters", "", ""),
    ]
    for name, title in titles.items():
        of_both = [
            f"{counted[dtype][name][f'{what}_bytes_per_parameter']:.2f}"
            if f"{what}_bytes_per_parameter" in counted[dtype][name]
            else ""
            for dtype in ("fp32", "bf16_with_fp32_masters")
            for what in ("codes", "save", "disk")
        ]
        rows.append((title, *of_both))
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in rows)


def make_ranks_table() -> str:
    """The table of what the vote costs, as it has to stand in docs/frameworks/index.md."""
    rows = [
        ("ranks, layers", "sent by a rank", "received by it", "received by rank 0", "vote and publish", "save by DCP's")
    ]
    rows.append(("---",) * 6)
    found = _read("ranks")["rows"]
    for row in found["measured"]:
        rows.append(
            (
                f"{row['ranks']}, {row['layers']}",
                f"{row['sent_bytes_per_save_per_rank'] / 1e3:.1f} kB",
                f"{row['received_bytes_per_save_per_rank'] / 1e3:.1f} kB",
                f"{row['coordinator_received_bytes_per_save'] / 1e3:.1f} kB",
                f"{row['vote_and_publish_secs'] * 1e3:.0f} ms",
                f"{row['save_by_dcp']:.2f}",
            )
        )
    last = found["simulated"][-1]
    rows.append(
        (
            f"{last['ranks']:,}, {last['layers']} (votes alone, one machine)",
            f"{last['vote_bytes'] / 1e3:.1f} kB",
            f"{last['verdict_bytes'] / 1e3:.1f} kB",
            f"{last['votes_bytes_at_coordinator'] / 1e3:,.0f} kB",
            f"{last['until_all_know_secs']:.1f} s",
            "",
        )
    )
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)


def make_monitor_table() -> str:
    """The table of what measuring layers is worth and costs, as it has to stand in docs/monitor.md."""
    rows = [
        (
            "optimizer",
            "error after 40 steps: median",
            "5 % to 95 %",
            "worst layer",
            "a measurement",
            "of a step of 1024 tokens",
            "of the time, a save every 20 steps of 64 tokens",
            "kept",
            "meanwhile",
        )
    ]
    rows.append(("---",) * 9)
    found = _read("monitor")["rows"]
    for name in ("AdamW", "SGD with momentum", "Adafactor"):
        row = found[name]
        error = row["error_after_40_percent"]
        low, high = error["5 % to 95 %"]
        rows.append(
            (
                name,
                f"{error['median']:+.1f} %",
                f"{low:+.1f} to {high:+.1f} %",
                f"{error['worst']:+.1f} %",
                f"{row['measure_ms_median']:.0f} ms",
                f"{row['share_of_a_step_of_1024_tokens_percent']:.2f} %",
                f"{row['share_of_the_time_at_a_save_every_20_steps_percent']:.2f} %",
                f"{row['kept_kb'] / 1e3:.1f} MB, {row['kept_share_of_memory_percent']:.2f} %",
                f"{row['meanwhile_kb'] / 1e3:.1f} MB, {row['meanwhile_share_of_memory_percent']:.2f} %",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _format_lost(regime: dict[str, Any]) -> str:
    if regime["is_identical"]:
        return "0, bit for bit"
    lost = round(regime["steps_lost"], 1) + 0.0  # -0.0 is read as less than nothing
    return f"{lost:.1f} +- {regime['steps_lost_sd']:.1f}"


def _read(question: str) -> dict[str, Any]:
    text = (ROOT / "benchmarks" / "results" / f"{question}.json").read_text(encoding="utf-8")
    record: dict[str, Any] = json.loads(text)
    return record


TABLES: Sequence[tuple[str, str, Callable[[], str]]] = (
    ("README.md", r"on \d+ cores", make_table),
    ("README.md", "a save of a Llama", make_save_table),
    ("README.md", "merge of two checkpoints", make_merge_table),
    ("README.md", "every save writes", make_codes_table),
    ("docs/codes.md", "bytes a parameter", make_bytes_table),
    ("docs/frameworks/index.md", "ranks, layers", make_ranks_table),
    ("docs/monitor.md", r"optimizer \| error", make_monitor_table),
)
"""Page, how the table on it begins, and what makes the table."""


def replace_table(text: str, beginning: str, table: str) -> str:
    """A page with the one table that begins so made anew."""
    found = re.findall(rf"^\| {beginning}.*?(?=\n\n)", text, re.DOTALL | re.MULTILINE)
    assert len(found) == 1, f"{len(found)} tables begin with {beginning!r}"
    return text.replace(found[0], table)


def main() -> None:
    for page, beginning, make in TABLES:
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        path.write_text(replace_table(text, beginning, make()), encoding="utf-8")


if __name__ == "__main__":
    main()
