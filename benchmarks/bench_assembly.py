"""What does the writing half of a merge cost against ``cp -r`` and fsync of the same bytes?

Two sources of 2 GB, each of 35 layers of 10 tensors; the result takes every other layer from either. Once as a file per
layer (with digests), once as two large archives with a CRC-32 for each tensor, as zip files need it; the tensors lie
at other offsets than in the source, so no block can be taken over as it is. Durable: fsync is included on both sides.
All methods take turns, with the page cache emptied before each (cold) or filled with the sources (warm).

    python benchmarks/bench_assembly.py [MiB per source] [repeats]
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from environment import publish

from llmtailor.assembly import execute
from llmtailor.file_plan import CheckpointPlan, CrcPatch, FilePlan, FileRange, Part, Zeros
from llmtailor.tensors import ByteRange

LAYERS = 35
TENSORS_PER_LAYER = 10
ARCHIVES = 2
HEADER_NBYTES = 4096
# Between two tensors of an archive, as a zip's local header would be.
GAP_NBYTES = 192


def make_source(directory: Path, nbytes: int, seed: int) -> None:
    """Layer files of random bytes, durable."""
    directory.mkdir()
    noise = memoryview(os.urandom(2**24 + 4096))
    for layer in range(LAYERS):
        with (directory / f"layer-{layer:03}").open("wb") as file:
            left = nbytes // LAYERS
            while left:
                start = (seed * 31 + layer * 7 + left) % 4096
                left -= file.write(noise[start : start + min(left, 2**24)])
            os.fsync(file.fileno())


def tensor_ranges(nbytes: int) -> list[ByteRange]:
    """Where the tensors of a layer file lie: end to end after the header, of uneven sizes."""
    room = nbytes - HEADER_NBYTES
    cuts = [room * i * (i + 1) // (TENSORS_PER_LAYER * (TENSORS_PER_LAYER + 1)) // 4 * 4 for i in range(11)]
    return [ByteRange(start=HEADER_NBYTES + low, end=HEADER_NBYTES + high) for low, high in itertools.pairwise(cuts)]


def layers_plan(sources: list[Path]) -> CheckpointPlan:
    """A file per layer, with a header of another size than the source's."""
    files = []
    for layer in range(LAYERS):
        path = sources[layer % len(sources)] / f"layer-{layer:03}"
        ranges = tensor_ranges(path.stat().st_size)
        parts = (bytes(HEADER_NBYTES + 8), *(FileRange(path=path, byte_range=each) for each in ranges))
        files.append(FilePlan(name=path.name, parts=parts))
    return CheckpointPlan(files=tuple(files))


def archives_plan(sources: list[Path]) -> CheckpointPlan:
    """A few large files, with a CRC before and after each tensor's bytes."""
    files = []
    for archive in range(ARCHIVES):
        parts: list[Part] = []
        patches = []
        at = 0
        for layer in range(archive, LAYERS, ARCHIVES):
            path = sources[layer % len(sources)] / f"layer-{layer:03}"
            for each in tensor_ranges(path.stat().st_size):
                parts += [Zeros(nbytes=GAP_NBYTES), FileRange(path=path, byte_range=each), Zeros(nbytes=16)]
                start = at + GAP_NBYTES
                end = start + each.nbytes
                patches.append(CrcPatch(byte_range=ByteRange(start=start, end=end), offsets=(at, end)))
                at = end + 16
        files.append(FilePlan(name=f"archive-{archive}", parts=tuple(parts), crc_patches=tuple(patches)))
    return CheckpointPlan(files=tuple(files))


def copy_and_sync(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in [*target.iterdir(), target, target.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def empty_cache(sources: list[Path]) -> None:
    os.sync()
    for path in (path for source in sources for path in source.iterdir()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    if os.access("/proc/sys/vm/drop_caches", os.W_OK) and os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")


def fill_cache(sources: list[Path]) -> None:
    os.sync()
    for path in (path for source in sources for path in source.iterdir()):
        with path.open("rb") as file:
            while file.read(2**24):
                pass


def measure(call: Callable[[Path], object], prepare: Callable[[], None], directory: Path) -> float:
    target = directory / "target"
    prepare()
    start = time.perf_counter()
    call(target)
    secs = time.perf_counter() - start
    shutil.rmtree(target)
    return secs


def writing_rows(directory: Path, mib: int, repeats: int) -> dict[str, object]:
    """Seconds of each method, cold and warm, and how many times faster than ``cp`` each is."""
    sources = [directory / "a", directory / "b"]
    for seed, source in enumerate(sources):
        make_source(source, mib * 2**20, seed)
    methods: dict[str, Callable[[Path], object]] = {
        "cp_and_fsync": lambda target: copy_and_sync(sources[0], target),
        "layer_files": lambda target: execute(layers_plan(sources), target),
        "archives_with_crc": lambda target: execute(archives_plan(sources), target),
    }
    rows: dict[str, object] = {"source_mib": mib, "sources": len(sources), "repeats": repeats}
    for cache, prepare in (("cold", empty_cache), ("warm", fill_cache)):
        secs: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(repeats):
            for name, call in methods.items():
                secs[name].append(measure(call, lambda prepare=prepare: prepare(sources), directory))
        medians = {name: statistics.median(values) for name, values in secs.items()}
        for name, values in secs.items():
            rows[f"{cache}_{name}_secs_median"] = round(medians[name], 3)
            rows[f"{cache}_{name}_secs_min"] = round(min(values), 3)
            rows[f"{cache}_{name}_secs_max"] = round(max(values), 3)
            rows[f"{cache}_{name}_gb_per_sec"] = round(mib * 2**20 / 1e9 / medians[name], 2)
            rows[f"{cache}_{name}_times_faster_than_cp"] = round(medians["cp_and_fsync"] / medians[name], 2)
    return rows


def main() -> None:
    mib, repeats = (int(text) for text in (sys.argv[1:] + ["2048", "3"][len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIRECTORY")) as directory:
        publish("assembly", writing_rows(Path(directory), mib, repeats))


if __name__ == "__main__":
    main()
