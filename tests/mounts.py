"""File systems that a test mounts for itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


class Mounts:
    """Mounts that go away after the test; the test is skipped where mounting is not permitted."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._mounted: list[Path] = []

    def mount(self, kind: str, options: str) -> Path:
        path = self._root / f"mount-{len(self._mounted)}"
        path.mkdir()
        self._call(["mount", "-t", kind, "-o", options, kind, str(path)])
        self._mounted.append(path)
        return path

    def cover_read_only(self, path: Path) -> None:
        """From now on whoever looks the path up finds it read-only; files that are open stay as they are."""
        self._call(["mount", "--bind", str(path), str(path)])
        self._mounted.append(path)
        self._call(["mount", "-o", "remount,bind,ro", str(path)])

    def uncover(self, path: Path) -> None:
        self._mounted.remove(path)
        subprocess.run(["umount", str(path)], check=True)

    def _call(self, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount ({done.stderr.strip()}); run as root, or under `unshare -Urm`")

    def close(self) -> None:
        for path in reversed(self._mounted):
            subprocess.run(["umount", "-l", str(path)], check=False)
