"""A merge is killed at any instant, again and again: sources stay as they were, the target is whole or absent."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from assembly.killable_merge import killable_plan
from assembly.merge_plans import digests, expected_bytes, left_over, write_source
from llmtailor.assembly import execute

NUM_KILLS = 30


def check(sources: Path, target: Path) -> None:
    plan = killable_plan(sources)
    for file in plan.files:
        assert (target / file.name).read_bytes() == expected_bytes(file.parts, file.crc_patches)
    assert (target / "linked").samefile(sources / "published")
    assert (target / "seal").read_bytes() == b"whole"


def kill(sources: Path, target: Path, delay_secs: float) -> None:
    script = Path(__file__).with_name("killable_merge.py")
    process = subprocess.Popen([sys.executable, str(script), str(sources), str(target)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"begun\n"
        time.sleep(delay_secs)
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_kill_at_any_instant_costs_nothing_but_the_merge(tmp_path: Path) -> None:
    sources, target = tmp_path / "sources", tmp_path / "target"
    for number in range(12):
        write_source(sources / f"layer-{number}", 500_000 + 777 * number)
    write_source(sources / "published", 1000, mode=0o444)
    before = digests(sources)
    start = time.perf_counter()
    execute(killable_plan(sources), target, threads=3, chunk_nbytes=65536)
    secs = time.perf_counter() - start
    shutil.rmtree(target)
    generator = random.Random(0)
    seen = {"whole": 0, "rubbish": 0}
    for _ in range(NUM_KILLS):
        # A new process imports a little yet, so it takes longer than this one did.
        kill(sources, target, generator.uniform(0, 2 * secs))
        assert digests(sources) == before
        assert len(left_over(tmp_path)) <= 1
        if target.exists():
            seen["whole"] += 1
            check(sources, target)
            shutil.rmtree(target)
        elif left_over(tmp_path):
            seen["rubbish"] += 1
            if generator.random() < 0.5:  # the next one is killed, too
                execute(killable_plan(sources), target)
                assert left_over(tmp_path) == []
                check(sources, target)
                shutil.rmtree(target)
    # A test that kills always too early or always too late shows nothing.
    assert seen["rubbish"] >= 5, seen
    execute(killable_plan(sources), target)
    assert left_over(tmp_path) == []
    check(sources, target)
