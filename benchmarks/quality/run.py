"""What do checkpoints cost in quality that are stale or coded in part? Trains, fails, restores and compares.

A Llama of 5 M parameters on real text, from scratch and fine-tuned, each restore against the uninterrupted run on the
same batches. Every result is kept as a file of its own; started again, it goes on where it was. ``summary.py`` makes
the table. Takes most of an hour, on one thread. ``--large`` trains 112 M parameters and compares less, in three hours
on one thread; its results are ``quality-large``. Two that train different regimes do not get in each other's way.
A run of the large ones takes up to 60 GB of disk (in ``BENCH_DIRECTORY``) at a time, less with fewer configurations.

    python benchmarks/quality/run.py [--large] [--device cuda] [--regime P] [names of configurations]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from configurations import REFERENCE, Configuration, list_configurations
from corpus import Corpus, load_corpus
from experiment import Experiment
from records import describe_machine, describe_work, find_result, keep_result, result_path
from settings import RESULTS, Regime, Settings, add_options, cache_directory, choose_settings
from training import count_parameters, load_base


@dataclass(frozen=True)
class Piece:
    """One regime and seed, and what is not there yet."""

    regime: Regime
    seed: int
    missing: list[Configuration]
    num_steps: int


@dataclass
class Progress:
    """Steps taken and to be taken."""

    num_steps: int
    num_taken: int = 0
    started: float = field(default_factory=time.monotonic)

    def note_steps(self, num_steps: int) -> None:
        self.num_taken += num_steps

    @property
    def text(self) -> str:
        elapsed = time.monotonic() - self.started
        left = elapsed / max(self.num_taken, 1) * (self.num_steps - self.num_taken)
        return f"{self.num_taken}/{self.num_steps} steps, {elapsed / 60:.1f} min, {left / 60:.0f} min left"


def run_all(
    settings: Settings, results: Path, cache: Path, only: Collection[str] = (), regimes: Collection[str] = ()
) -> int:
    """Measure what is not there yet, seed by seed; returns how many results that was.

    Args:
        settings: What to measure.
        results: Directory of the results.
        cache: Directory of tokens and base model.
        only: Names of configurations; all if empty.
        regimes: Names of regimes; all if empty.
    """
    chars = settings.corpus_chars
    corpus = load_corpus(cache, vocabulary=settings.model.vocabulary, chars=chars)
    configurations = [each for each in list_configurations(settings) if not only or each.name in only]
    pieces = [
        plan_piece(settings, results, regime, seed, configurations, corpus)
        for seed in settings.seeds
        for regime in settings.regimes
        if not regimes or regime.name in regimes
    ]
    pieces = [piece for piece in pieces if piece.missing]
    if not pieces:
        say("nothing is missing")
        return 0
    progress = Progress(sum(piece.num_steps for piece in pieces))
    say(f"{sum(len(piece.missing) for piece in pieces)} results are missing, {progress.num_steps} steps")
    weights = None
    if any(piece.regime.from_base for piece in pieces):
        weights = load_base(settings, corpus, cache, say)
    progress.started = time.monotonic()
    for piece in pieces:
        measure_piece(settings, results, piece, corpus, weights if piece.regime.from_base else None, progress)
    return sum(len(piece.missing) for piece in pieces)


def plan_piece(
    settings: Settings,
    results: Path,
    regime: Regime,
    seed: int,
    configurations: Sequence[Configuration],
    corpus: Corpus,
) -> Piece:
    missing = [
        each
        for each in configurations
        if find_result(result_path(results, regime, seed, each), describe_work(settings, regime, seed, each, corpus))
        is None
    ]
    once = regime.steps - regime.failure_step
    often = regime.steps - settings.failure_steps[0]
    counts = {0: 0, 1: once, len(settings.failure_steps): often}
    return Piece(regime, seed, missing, regime.steps + sum(counts[each.failures] for each in missing))


def measure_piece(
    settings: Settings,
    results: Path,
    piece: Piece,
    corpus: Corpus,
    weights: dict[str, torch.Tensor] | None,
    progress: Progress,
) -> None:
    label = f"{piece.regime.name} seed {piece.seed}"
    say(f"{label}: uninterrupted run, {len(piece.missing)} configurations; {progress.text}")
    scratch = Path(tempfile.mkdtemp(prefix="llmtailor-quality-", dir=os.environ.get("BENCH_DIRECTORY")))
    try:
        experiment = Experiment(
            settings, piece.regime, corpus, piece.seed, weights, scratch, note_steps=progress.note_steps
        )
        for configuration, result in experiment.measure(piece.missing):
            work = describe_work(settings, piece.regime, piece.seed, configuration, corpus)
            keep_result(result_path(results, piece.regime, piece.seed, configuration), work, result)
            if configuration.strategy == "full":
                assert result["is_identical"], f"{label}: a run restored from full checkpoints differs"
            say(f"{label}: {configuration.name:38} {describe(configuration, result)}; {progress.text}")
    finally:
        shutil.rmtree(scratch)


def describe(configuration: Configuration, result: dict[str, float]) -> str:
    if configuration == REFERENCE:
        return f"validation loss {result['loss_at_end']:.4f}"
    written = result.get("bytes_per_save", 0) / 1e6
    identical = ", bit-identical" if result["is_identical"] else ""
    return f"{result['difference_at_end']:+.5f}, {written:.1f} MB a save{identical}"


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> None:
    os.nice(5)
    options = parse_options()
    settings, results = choose_settings(options)
    if settings.device == "cuda":
        if not torch.cuda.is_available():
            print("skipped: torch sees no CUDA device", file=sys.stderr)
            return
        # What cuBLAS computes is the same twice only so. Source: CUDA 13, cuBLAS, "Results Reproducibility".
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.set_float32_matmul_precision("high")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name, value in describe_machine().items():
        say(f"{name}: {value}")
    size = settings.model
    say(f"parameters: {count_parameters(size, settings.sequence_length)}; {size}")
    for regime in settings.regimes:
        say(f"{regime}")
    say(f"seeds {settings.seeds}, sequences of {settings.sequence_length}, {settings.batch_size} a batch")
    num_measured = run_all(
        settings, RESULTS / results, cache_directory(), only=options.configurations, regimes=options.regime
    )
    say(f"done; {num_measured} results are new. Now summary.py, with the same --large and --device")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_options(parser)
    parser.add_argument("--regime", action="append", default=[], help="P or F alone (default: both)")
    parser.add_argument("configurations", nargs="*", help="names as in the results (default: all)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
