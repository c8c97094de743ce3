"""What every benchmark says about where it ran, and where its results go."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import llmtailor

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, Any]:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "llmtailor": llmtailor.__version__,
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def publish(question: str, rows: dict[str, Any]) -> None:
    """Print the rows and keep them as ``results/<question>.json``."""
    record = {"question": question, "environment": describe(), "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{question}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))
