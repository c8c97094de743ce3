"""What a process may still take: in a container, less than the machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtailor.writer.free_memory import free_nbytes

MIB = 2**20


class Machine:
    """A made-up /proc and /sys/fs/cgroup."""

    def __init__(self, root: Path, *, available: int, membership: str) -> None:
        self.proc, self.cgroups = root / "proc", root / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {available // 1024} kB\n")
        (self.proc / "self/cgroup").write_text(membership)

    def group(self, path: str, **files: object) -> None:
        directory = self.cgroups / path
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (directory / name.replace("__", ".")).write_text(f"{content}\n")

    def free(self) -> int:
        return free_nbytes(self.proc, self.cgroups)


def test_without_groups_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert Machine(tmp_path, available=100 * MIB, membership="0::/\n").free() == 100 * MIB


def test_a_group_without_a_limit_takes_nothing_away(tmp_path: Path) -> None:
    machine = Machine(tmp_path, available=100 * MIB, membership="0::/a\n")
    machine.group("a", memory__max="max", memory__current=MIB, memory__stat="inactive_file 0")
    assert machine.free() == 100 * MIB


@pytest.mark.parametrize("limited", ["a", "a/b", ""])
def test_the_limit_of_every_group_above_counts(tmp_path: Path, limited: str) -> None:
    machine = Machine(tmp_path, available=1000 * MIB, membership="0::/a/b\n")
    machine.group("a/b", memory__max="max", memory__current=MIB, memory__stat="inactive_file 0")
    stat = f"anon 5\ninactive_file {20 * MIB}\nactive_file 7"
    machine.group(limited, memory__max=100 * MIB, memory__current=70 * MIB, memory__stat=stat)
    assert machine.free() == 50 * MIB, "file pages that nobody uses are given back"


def test_a_container_that_sees_its_group_as_the_top(tmp_path: Path) -> None:
    machine = Machine(tmp_path, available=1000 * MIB, membership="0::/not/here\n")
    machine.group("", memory__max=64 * MIB, memory__current=60 * MIB, memory__stat="inactive_file 0")
    assert machine.free() == 4 * MIB


def test_version_1(tmp_path: Path) -> None:
    machine = Machine(tmp_path, available=1000 * MIB, membership="5:cpu,cpuacct:/x\n4:memory:/docker/1\n0::/\n")
    machine.group(
        "memory/docker/1",
        memory__limit_in_bytes=200 * MIB,
        memory__usage_in_bytes=150 * MIB,
        memory__stat=f"inactive_file 1\ntotal_inactive_file {30 * MIB}",
    )
    machine.group("memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=MIB, memory__stat="cache 0")
    assert machine.free() == 80 * MIB


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path, available=1000 * MIB, membership="0::/\n")
    machine.group("", memory__max=10 * MIB, memory__current=12 * MIB, memory__stat="inactive_file 0")
    assert machine.free() == 0


def test_where_nothing_tells_nothing_is_known_to_be_free(tmp_path: Path) -> None:
    assert free_nbytes(tmp_path / "proc", tmp_path / "cgroup") == 0


def test_of_this_machine() -> None:
    with open("/proc/meminfo", encoding="ascii") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    assert 0 < free_nbytes() <= available * 1.1
