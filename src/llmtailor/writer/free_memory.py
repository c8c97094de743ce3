"""How much memory this process may still take: of the machine, and of the control groups (containers) that it is in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["free_nbytes"]

# Limit, use, and in memory.stat what the kernel gives back first. Source: Linux,
# Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_nbytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that may be taken without swapping, and without being killed for it; 0 if nothing tells.

    Args:
        proc: Where the kernel tells about processes.
        cgroups: Where control groups are mounted, version 2 or 1.

    Source: Linux, Documentation/filesystems/proc.rst (MemAvailable).
    """
    available = 0
    with contextlib.suppress(OSError, ValueError):
        fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text(encoding="ascii").splitlines())
        available = int(fields.get("MemAvailable", "0 kB").split()[0]) * 1024
    return max(0, min([available, *_left_in_groups(proc / "self/cgroup", cgroups)]))


def _left_in_groups(membership: Path, cgroups: Path) -> Iterator[int]:
    """What is left to each group that has a limit; a group may take no more than those above it."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = cgroups / "memory" if controllers else cgroups
        # In a container the path may be the host's, and the top be the container's group.
        for group in (top, *(top.joinpath(*path.split("/")[1:depth]) for depth in range(2, path.count("/") + 2))):
            left = _left(group, *(_V1 if controllers else _V2))
            if left is not None:
                yield left


def _left(group: Path, limit: str, use: str, reclaimable: str) -> int | None:
    try:
        limit_nbytes = int((group / limit).read_text(encoding="ascii"))  # "max" is none
        used_nbytes = int((group / use).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    return limit_nbytes - used_nbytes + int(stat.get(reclaimable, 0))
