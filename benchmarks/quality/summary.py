"""From the kept results to one JSON file, a picture, and the tables of ``docs/quality.md``.

A difference of the validation loss is read in steps: how many steps everything would have to be stale to make the same
difference, linearly in between and beyond; by the same seed's references, or by their means over the seeds where those
of some seed do not ascend.

    python benchmarks/quality/summary.py [--large] [--device cuda]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configurations import REFERENCE, Configuration, list_configurations
from corpus import load_corpus
from plot import draw_costs
from records import describe_machine, describe_work, find_result, result_path
from settings import RESULTS, Regime, Settings, add_options, cache_directory, choose_settings
from tables import make_tables
from training import count_parameters

DOCUMENT = Path(__file__).parents[2] / "docs" / "quality.md"
_END = "<!-- end -->"

Result = Mapping[str, Any]
Results = Mapping[str, Mapping[int, Mapping[str, Result]]]
"""Regime -> seed -> configuration -> result."""


def read_results(settings: Settings, directory: Path, cache: Path) -> Results:
    """Those that are there."""
    corpus = load_corpus(cache, vocabulary=settings.model.vocabulary, chars=settings.corpus_chars)
    results: dict[str, dict[int, dict[str, Result]]] = defaultdict(lambda: defaultdict(dict))
    for regime in settings.regimes:
        for seed in settings.seeds:
            for each in list_configurations(settings):
                work = describe_work(settings, regime, seed, each, corpus)
                result = find_result(result_path(directory, regime, seed, each), work)
                if result is not None:
                    results[regime.name][seed][each.name] = result
    return results


def steps_lost(difference: float, references: Sequence[tuple[int, float]]) -> float | None:
    """Steps that everything would have to be stale to end with this difference.

    Args:
        difference: Of the validation loss at the end.
        references: Steps that everything was stale, and the difference that this made; ascending.

    Returns:
        None if the references do not ascend: then staleness costs less than the noise.
    """
    if not _do_ascend(references):
        return None
    pairs = list(itertools.pairwise([(0, 0.0), *references]))
    left, right = next((pair for pair in pairs if difference <= pair[1][1]), pairs[-1])
    return left[0] + (difference - left[1]) / (right[1] - left[1]) * (right[0] - left[0])


def _do_ascend(references: Sequence[tuple[int, float]]) -> bool:
    return all(left[1] < right[1] for left, right in itertools.pairwise([(0, 0.0), *references]))


def summarize(settings: Settings, results: Results) -> dict[str, Any]:
    rows: dict[str, Any] = {
        "parameters": count_parameters(settings.model, settings.sequence_length),
        "settings": asdict(settings),
        "cpu_minutes": round(sum(result["cpu_secs"] for result in _all(results)) / 60, 1),
        "one_failure": [],
        "several_failures": [],
    }
    for each in list_configurations(settings):
        if each == REFERENCE:
            continue
        row = {
            "strategy": each.strategy,
            "rest": each.rest,
            "interval": each.interval,
            "failures": each.failures,
            "regimes": {
                regime.name: _summarize_regime(settings, regime, each, results.get(regime.name, {}))
                for regime in settings.regimes
            },
        }
        rows["one_failure" if each.failures == 1 else "several_failures"].append(row)
    plain: dict[str, Any] = json.loads(json.dumps(rows))
    return plain


def _all(results: Results) -> list[Result]:
    return [result for seeds in results.values() for named in seeds.values() for result in named.values()]


def _summarize_saves(
    settings: Settings, configuration: Configuration, seeds: Mapping[int, Mapping[str, Result]]
) -> dict[str, Any]:
    """Bytes per step by those of ``full`` at its interval, and layers of a save that were too far off for codes."""
    full = Configuration(strategy="full", interval=settings.interval).name
    pairs = [
        (each[configuration.name], each[full]) for each in seeds.values() if {configuration.name, full} <= each.keys()
    ]
    if not pairs:
        return {"share_of_bytes": None, "layers_over_limit": None}
    counts = [count for result, _ in pairs for count in result["layers_over_limit"][1:]]
    share = statistics.fmean(result["bytes_per_step"] / of_full["bytes_per_step"] for result, of_full in pairs)
    return {"share_of_bytes": round(share, 3), "layers_over_limit": round(statistics.fmean(counts), 2)}


def _summarize_regime(
    settings: Settings, regime: Regime, configuration: Configuration, seeds: Mapping[int, Mapping[str, Result]]
) -> dict[str, Any]:
    """Means and standard deviations over the seeds, rounded as they are printed."""
    found = {seed: named[configuration.name] for seed, named in seeds.items() if configuration.name in named}
    references, is_of_seed = _find_references(settings, seeds)
    lost = [
        steps_lost(result["difference_at_end"], references[seed]) if seed in references else None
        for seed, result in found.items()
    ]
    row: dict[str, Any] = {
        "seeds": len(found),
        "references": "of the seed" if is_of_seed else "means over the seeds",
        "is_identical": bool(found) and all(result["is_identical"] for result in found.values()),
        **_spread("difference_at_end", [result["difference_at_end"] for result in found.values()], 5),
        **_spread("difference_of_last_losses", [each["difference_of_last_losses"] for each in found.values()], 5),
    }
    if configuration.is_saved:
        row |= _summarize_saves(settings, configuration, seeds)
    if configuration.failures > 1:
        return row
    row |= _spread("difference_at_restore", [each["difference_at_restore"] for each in found.values()], 5)
    known = [each for each in lost if each is not None]
    row |= _spread("steps_lost", known if len(known) == len(lost) else [], 2)
    if configuration.is_saved and row["steps_lost"] is not None:
        row["expected_cost"] = round(configuration.interval / 2 + row["steps_lost"], 2)
    return row


def _find_references(
    settings: Settings, seeds: Mapping[int, Mapping[str, Result]]
) -> tuple[dict[int, list[tuple[int, float]]], bool]:
    """Of each seed that has them all; their own (True), or the means over the seeds, of which not all ascend."""
    names = {Configuration(strategy="stale", interval=age).name: age for age in settings.stale_ages}
    own = {
        seed: [(age, float(named[name]["difference_at_end"])) for name, age in names.items()]
        for seed, named in seeds.items()
        if names.keys() <= named.keys()
    }
    if all(map(_do_ascend, own.values())):
        return own, True
    means = [(age, statistics.fmean(each[n][1] for each in own.values())) for n, age in enumerate(settings.stale_ages)]
    return dict.fromkeys(own, means), False


def _spread(name: str, values: Sequence[float], digits: int) -> dict[str, float | None]:
    return {
        name: round(statistics.fmean(values), digits) if values else None,
        f"{name}_sd": round(statistics.stdev(values), digits) if len(values) > 1 else None,
    }


def write_document(path: Path, name: str, tables: str) -> None:
    """Put the tables between the marks that the document has for these results, if it has them."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(f"<!-- begin: {name} -->")
    if begin:
        _, mark, after = rest.partition(_END)
        assert mark, f"{path} lacks {_END}"
        path.write_text(f"{before}{begin}\n\n{tables}\n{_END}{after}", encoding="utf-8")


def publish(settings: Settings, directory: Path, cache: Path, document: Path | None = None) -> dict[str, Any]:
    """Write JSON and picture beside the directory of the results, with its name; returns the rows."""
    rows = summarize(settings, read_results(settings, directory, cache))
    record = {"question": directory.name, "environment": describe_machine(), "rows": rows}
    directory.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    draw_costs(rows, directory.with_suffix(".png"))
    tables = make_tables(rows)
    if document is not None:
        write_document(document, directory.name, tables)
        draw_costs(rows, document.with_name(directory.name).with_suffix(".png"))
    print(tables)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_options(parser)
    settings, name = choose_settings(parser.parse_args())
    publish(settings, RESULTS / name, cache_directory(), DOCUMENT if DOCUMENT.exists() else None)


if __name__ == "__main__":
    main()
