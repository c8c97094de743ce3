"""How near to the truth is what the monitor says of each layer, and what does it cost?

A Llama of 35 layers is trained with three optimizers, one after the other. At some steps the monitor's estimate of each
layer's drift is held against the true one, from a copy of all weights; and a measurement is timed against a step of
training on 64 tokens, and on 1024, which is still small. One measurement belongs to one save.

    python benchmarks/bench_monitor.py [hidden size] [vocabulary]
"""

from __future__ import annotations

import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from environment import publish
from models import llama_of_35_layers

from llmtailor.drift import LayerDrift
from llmtailor.live_state import LiveReader
from llmtailor.monitor import Monitor

WINDOWS = (8, 20, 40)
OPTIMIZERS: Mapping[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.95)),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
}


class Training:
    """A model that is trained on random tokens, and its monitor."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, vocabulary: int) -> None:
        self.model, self.optimizer, self._vocabulary = model, optimizer, vocabulary
        self.monitor = Monitor()
        self._reader = LiveReader()

    def step(self, num_tokens: int = 64) -> float:
        start = time.perf_counter()
        tokens = torch.randint(0, self._vocabulary, (1, num_tokens))
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def measure(self) -> tuple[float, dict[str, LayerDrift]]:
        start = time.perf_counter()
        live = self._reader.read(self.model, [self.optimizer])
        drifts = self.monitor.measure(self.monitor.look(live), live, {})
        return time.perf_counter() - start, drifts

    def true_drifts(self, before: Mapping[str, torch.Tensor]) -> dict[str, float]:
        now = dict(self.model.named_parameters())
        layers = self._reader.read(self.model, [self.optimizer]).layers
        return {
            layer.name: (
                sum(float((now[fqn].detach() - before[fqn]).double().square().sum()) for fqn in layer.fqns)
                / sum(float(before[fqn].double().square().sum()) for fqn in layer.fqns)
            )
            ** 0.5
            for layer in layers
        }

    def kept_nbytes(self) -> int:
        """What the monitor holds on to between two saves."""
        indices = sum(indices.nbytes for _, indices in self.monitor._chooser._known.values())
        return indices + sum(values.nbytes for saved in self.monitor._saved.values() for values in saved.values())


def measure_optimizer(name: str, hidden_size: int, vocabulary: int) -> dict[str, Any]:
    model, _ = llama_of_35_layers(hidden_size, vocabulary)
    training = Training(model, OPTIMIZERS[name](model.parameters()), vocabulary)
    training.step()
    training.measure()
    before = {fqn: parameter.detach().clone() for fqn, parameter in model.named_parameters()}
    rows: dict[str, Any] = {}
    step_secs = []
    for step in range(1, WINDOWS[-1] + 1):
        step_secs.append(training.step())
        if step in WINDOWS:
            found, truth = training.measure()[1], training.true_drifts(before)
            errors = sorted(100 * (found[layer].relative / true - 1) for layer, true in truth.items())
            quantiles = statistics.quantiles(errors, n=20)
            rows[f"error_after_{step}_percent"] = {
                "median": round(statistics.median(errors), 2),
                "5 % to 95 %": [round(quantiles[0], 2), round(quantiles[-1], 2)],
                "worst": round(max(errors, key=abs), 2),
            }
    measure_secs = [training.measure()[0] for _ in range(10)]
    tracemalloc.start()
    training.measure()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    parameters = sum(each.nbytes for each in model.parameters())
    state = sum(
        value.nbytes for each in training.optimizer.state.values() for value in each.values() if torch.is_tensor(value)
    )
    model_nbytes = 2 * parameters + state  # gradients, too
    secs = statistics.median(measure_secs)
    usual_secs = statistics.median(training.step(1024) for _ in range(3))
    return rows | {
        "tells_importance": all(each.importance is not None for each in training.measure()[1].values()),
        "measure_ms_median": round(1e3 * secs, 2),
        "step_ms_median": round(1e3 * statistics.median(step_secs), 1),
        "step_of_1024_tokens_ms_median": round(1e3 * usual_secs, 1),
        "share_of_a_step_percent": round(100 * secs / statistics.median(step_secs), 2),
        "share_of_a_step_of_1024_tokens_percent": round(100 * secs / usual_secs, 2),
        "share_of_the_time_at_a_save_every_20_steps_percent": round(5 * secs / statistics.median(step_secs), 3),
        "kept_kb": round(training.kept_nbytes() / 1e3),
        "kept_share_of_memory_percent": round(100 * training.kept_nbytes() / model_nbytes, 3),
        "meanwhile_kb": round(peak / 1e3),
        "meanwhile_share_of_memory_percent": round(100 * peak / model_nbytes, 3),
    }


def main() -> None:
    hidden_size = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    vocabulary = int(sys.argv[2]) if len(sys.argv) > 2 else 16384
    rows: dict[str, Any] = {"hidden_size": hidden_size, "vocabulary": vocabulary, "layers": 35}
    model, _ = llama_of_35_layers(hidden_size, vocabulary)
    rows["parameters"] = sum(each.numel() for each in model.parameters())
    del model
    for name in OPTIMIZERS:
        rows[name] = measure_optimizer(name, hidden_size, vocabulary)
    publish("monitor", rows)


if __name__ == "__main__":
    main()
