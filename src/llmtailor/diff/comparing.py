"""Carries out a comparison: a few threads, each with a tensor at a time."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..assembly.arithmetic import check_arithmetic
from ..assembly.sources import SourceFiles
from .pairing import DiffPlan, Kind, LayerPlan, Pair, plan_diff
from .records import Difference, Distance, LayerDifference, TensorDifference
from .summing import CHUNK_NBYTES, Comparer

__all__ = ["compare", "diff_checkpoints"]

# More do not make a disk faster, and each holds three chunks.
_NUM_THREADS = 4


def diff_checkpoints(
    a: Path | str,
    b: Path | str,
    *,
    only: Kind | None = None,
    layers: Sequence[str] = (),
    parameter_names: Sequence[str] | None = None,
) -> Difference:
    """Tell how checkpoint B differs from checkpoint A, tensor by tensor; see docs/diff.md.

    Args:
        a: A checkpoint of any format.
        b: Another one.
        only: What to compare; both if left out.
        layers: Patterns of layer names as in a recipe (``layers.0-3``, ``layers.*``); all if empty.
        parameter_names: Of ``optimizer.pt``, where they cannot be told.

    Raises:
        TailorError: What is wrong with the checkpoints, or with what was asked.
    """
    return compare(plan_diff(a, b, only=only, layers=layers, parameter_names=parameter_names))


def compare(
    plan: DiffPlan, *, on_bytes: Callable[[int], None] = lambda nbytes: None, chunk_nbytes: int = CHUNK_NBYTES
) -> Difference:
    """Read what has to be read, and sum it up. Memory stays below some 100 MB.

    Args:
        plan: From ``plan_diff``.
        on_bytes: Told of bytes as they are done; they add up to ``plan.nbytes``. Called by any thread.
        chunk_nbytes: What is read of a tensor at a time; a thread holds three times as much.

    Raises:
        IntegrityError: A file changed meanwhile.
        NotFoundError, FormatError: A file is gone, is no regular file, or holds codes that make no sense.
        UnsupportedError: Codes of a type that cannot be decoded.
        WriteError: A file cannot be read (``unreadable``).
    """
    pairs = [pair for layer in plan.layers for pair in layer.pairs]
    for tensor in (tensor for pair in pairs if not pair.is_same for tensor in (pair.a, pair.b)):
        check_arithmetic(tensor)
    with SourceFiles() as sources:
        distances = iter(_compare_pairs(pairs, sources, on_bytes, chunk_nbytes))
        sources.check_unchanged()
    return Difference(a=plan.a, b=plan.b, layers=tuple(_conclude(layer, distances) for layer in plan.layers))


def _compare_pairs(
    pairs: Sequence[Pair], sources: SourceFiles, on_bytes: Callable[[int], None], chunk_nbytes: int
) -> list[Distance]:
    num_threads = min(_NUM_THREADS, 1 + sum(pair.nbytes for pair in pairs) // chunk_nbytes)
    idle: queue.SimpleQueue[Comparer] = queue.SimpleQueue()
    for _ in range(num_threads):
        idle.put(Comparer(sources, chunk_nbytes))

    def work(pair: Pair) -> Distance:
        if pair.is_same:
            numel = pair.a.meta.numel * (2 if pair.a.meta.dtype == "C64" else 1)
            return Distance(numel=numel, num_equal=numel, num_unread=numel)
        comparer = idle.get()
        try:
            return comparer.compare(pair.a, pair.b, on_bytes)
        finally:
            idle.put(comparer)

    if num_threads == 1:
        return [work(pair) for pair in pairs]
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="llmtailor-diff")
    try:
        return list(pool.map(work, pairs))
    finally:
        # Nobody holds a descriptor any more when the files are closed.
        pool.shutdown(cancel_futures=True)


def _conclude(layer: LayerPlan, distances: Iterator[Distance]) -> LayerDifference:
    """A layer, with the distances of its pairs, which come next."""
    tensors = tuple(
        TensorDifference(
            layer=pair.layer,
            component=pair.component,
            fqn=pair.fqn,
            a=pair.a.meta,
            b=pair.b.meta,
            distance=next(distances),
        )
        for pair in layer.pairs
    )
    return LayerDifference(
        name=layer.name,
        step_a=layer.step_a,
        step_b=layer.step_b,
        same_files=layer.same_files,
        same_numel=layer.same_numel,
        tensors=tensors,
        unmatched=layer.unmatched,
    )
