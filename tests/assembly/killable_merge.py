"""Merges until it is killed: ``killable_merge.py <sources> <target>``; says "begun" when it is about to start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from llmtailor.assembly import execute
from llmtailor.file_plan import CheckpointPlan, CrcPatch, FilePlan, FileRange, LinkPlan
from llmtailor.manifest import digest_of
from llmtailor.tensors import ByteRange

CHUNK = 65536


def killable_plan(sources: Path) -> CheckpointPlan:
    """Files of a few chunks, with and without CRCs, and a link."""
    paths = sorted(path for path in sources.iterdir() if path.name.startswith("layer"))
    files = []
    for number, path in enumerate(paths):
        nbytes = path.stat().st_size
        part = FileRange(path=path, byte_range=ByteRange(start=1, end=nbytes))
        patch = CrcPatch(byte_range=ByteRange(start=8, end=nbytes), offsets=(0,))
        patches = (patch,) if number % 2 else ()
        files.append(FilePlan(name=f"{number % 3}/{path.name}", parts=(bytes(8), part), crc_patches=patches))
    linked = sources / "published"
    content = linked.read_bytes()
    link = LinkPlan(name="linked", source=linked, nbytes=len(content), digest=digest_of(content))
    return CheckpointPlan(
        files=tuple(files), links=(link,), seal=lambda written: FilePlan(name="seal", parts=(b"whole",))
    )


def main() -> None:
    sources, target = (Path(text) for text in sys.argv[1:])
    plan = killable_plan(sources)
    os.write(1, b"begun\n")
    execute(plan, target, threads=3, chunk_nbytes=CHUNK)
    os.write(1, b"ended\n")


if __name__ == "__main__":
    main()
