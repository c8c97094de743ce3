"""The bytes of the LLMTailor paper.

Sun et al., PDSW'25 (arXiv 2602.22158), tables 3 and 6: GB that all checkpoints of a run take. The paper does not
say how it counted; this fits its figures: full is 16 checkpoints of Llama-3.1-8B and 17 of Qwen2.5-7B. Parity is half
of full, so no first full save is in it. Filter is a first full save and then blocks alone, within 1 %.
"""

from __future__ import annotations

import pytest

from estimate.real_runs import CONFIGS
from llmtailor.estimate import Estimate, Schedule, StrategyEstimate, estimate_runs, read_model_tensors
from llmtailor.layers import LayerKind
from llmtailor.strategies import Custom, SaveContext, Strategy
from llmtailor.strategies.filter import outer_blocks

GB = 1000**3
# Saves, then GB with full, parity and filter.
PAPER = {"llama-3.1-8b": (16, 1799.52, 899.76, 420.0), "qwen2.5-7b": (17, 1811.52, 905.76, 434.56)}
PARAMETERS = {"llama-3.1-8b": 8_030_261_248, "qwen2.5-7b": 7_615_616_512}


def estimate(model: str, *strategies: str | Strategy, is_resumed: bool = False) -> Estimate:
    schedule = Schedule(steps=PAPER[model][0] * 100, every=100, is_resumed=is_resumed)
    return estimate_runs(read_model_tensors(str(CONFIGS / f"{model}.json")), schedule, strategies=strategies)


def gb(run: StrategyEstimate) -> float:
    return run.run_nbytes / GB


@pytest.mark.parametrize("model", PAPER)
def test_a_full_checkpoint_is_14_bytes_a_parameter(model: str) -> None:
    found = estimate(model, "full")
    assert found.model.num_parameters == PARAMETERS[model]
    assert found.checkpoint_nbytes == pytest.approx(14 * PARAMETERS[model], rel=1e-4)


def test_a_full_checkpoint_of_llama_is_112_gb() -> None:
    assert estimate("llama-3.1-8b", "full").checkpoint_nbytes / GB == pytest.approx(112.4, abs=0.05)


@pytest.mark.parametrize("model", PAPER)
def test_full_and_parity_are_as_published(model: str) -> None:
    full, parity = estimate(model, "full", "parity", is_resumed=True).runs
    assert gb(full) == pytest.approx(PAPER[model][1], rel=0.001)
    assert gb(parity) == pytest.approx(PAPER[model][2], rel=0.001)


def choose_blocks(context: SaveContext) -> list[str]:
    """Outer blocks always, half of the other blocks at every fifth save, nothing but blocks and norms."""
    turn, remainder = divmod(context.save_index, 5)
    inner = [each for each in context.layers if each.kind is LayerKind.BLOCK]
    half = [] if remainder else [each.name for each in inner if (each.index or 0) % 2 == turn % 2]
    others = [each.name for each in context.layers if each.kind is LayerKind.OTHER]
    return [*outer_blocks(context.layers, 2, 2), *half, *others]


PAPER_FILTER = Custom(choose_blocks, max_age=10_000)


@pytest.mark.parametrize("model", PAPER)
def test_filter_without_embedding_and_head_is_as_published(model: str) -> None:
    (run,) = estimate(model, PAPER_FILTER).runs
    assert gb(run) == pytest.approx(PAPER[model][3], rel=0.01)


@pytest.mark.parametrize("model", PAPER)
def test_our_filter_writes_embedding_and_head_on_top(model: str) -> None:
    """One of the two with each half, at saves 5, 10 and 15."""
    found = estimate(model, "filter", PAPER_FILTER)
    ours, paper = found.runs
    heads = [layer for layer in found.layers if layer.kind in (LayerKind.EMBEDDING, LayerKind.HEAD)]
    assert len({layer.exact_nbytes // 10**6 for layer in heads}) == 1  # the two are equally large
    assert ours.run_nbytes - paper.run_nbytes == 3 * heads[0].exact_nbytes
    assert 1.04 < gb(ours) / PAPER[model][3] < 1.07


@pytest.mark.parametrize("model", PAPER)
def test_our_filter_after_a_full_checkpoint_writes_less_than_published(model: str) -> None:
    (run,) = estimate(model, "filter", is_resumed=True).runs
    assert 0.82 < gb(run) / PAPER[model][3] < 0.84
