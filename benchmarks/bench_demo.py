"""What does a crash in the middle of a save cost, on the main job? One run of ``llmtailor demo``.

Keeps the record and the picture of the losses beside it.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from environment import RESULTS, publish

from llmtailor.demo.options import DemoOptions
from llmtailor.demo.run import run_demo


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        report = run_demo(DemoOptions(), Path(directory))
        record = report.record()
        shutil.copy(Path(directory) / "loss.png", RESULTS / "demo.png")
    for local in ("output", "plot"):
        record.pop(local, None)
    publish("demo", record)


if __name__ == "__main__":
    main()
