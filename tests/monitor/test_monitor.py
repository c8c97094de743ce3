"""What the monitor says of a training against the truth, which a copy of the model tells."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from llmtailor.drift import LayerDrift
from llmtailor.live_state import LiveLayers, LiveReader
from llmtailor.monitor import GradientNorms, Monitor
from llmtailor.monitor.picks import NUM_PICKS, Chooser, pick_entries
from master_adamw import LEAF, MasterAdamW
from tiny_models import VOCABULARY, build_llama, snapshot_model

Optimizers = Callable[[Any], torch.optim.Optimizer]
ADAM = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


class Training:
    """A model, its optimizer, and a monitor that looks at both."""

    def __init__(self, make: Optimizers, **model: Any) -> None:
        torch.manual_seed(0)
        self.model = build_llama(**model)
        self.optimizer = make(self.model.parameters())
        self.monitor = Monitor()
        self._reader = LiveReader()
        self._start: Mapping[str, torch.Tensor] = {}

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            tokens = torch.randint(0, VOCABULARY, (2, 8))
            self.model(input_ids=tokens, labels=tokens).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def live(self) -> LiveLayers:
        return self._reader.read(self.model, [self.optimizer])

    def measure(self, saved: Mapping[str, int] | None = None) -> dict[str, LayerDrift]:
        live = self.live()
        return self.monitor.measure(self.monitor.look(live), live, saved or {})

    def note_save(self, step: int, saved: Mapping[str, int] | None = None) -> None:
        self.monitor.note_save(step, self.monitor.look(self.live()).weights, saved or {})

    def fqns(self, layer: str) -> tuple[str, ...]:
        return next(each.fqns for each in self.live().layers if each.name == layer)


def norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(each.double().square().sum()) for each in tensors))


def true_drift(training: Training, before: Mapping[str, torch.Tensor]) -> dict[str, float]:
    now = snapshot_model(training.model)
    return {
        layer.name: norm([now[fqn].float() - before[fqn].float() for fqn in layer.fqns])
        / norm([before[fqn].float() for fqn in layer.fqns])
        for layer in training.live().layers
    }


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **ADAM)


OPTIMIZERS = {
    "adamw": adamw,
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_drift_is_the_true_one_within_a_few_percent(name: str) -> None:
    # Large enough that only some of the entries are looked at.
    training = Training(OPTIMIZERS[name], width=128)
    training.step()
    training.measure()
    before = snapshot_model(training.model)
    training.step(6)
    found, truth = training.measure(), true_drift(training, before)
    errors = {layer: found[layer].relative / truth[layer] - 1 for layer in truth}  # type: ignore[operator]
    assert all(sum(training.model.get_parameter(f).numel() for f in training.fqns(n)) > NUM_PICKS for n in ["layers.0"])
    # Gradients of SGD are heavy-tailed: a few rows of the embedding carry most of its movement.
    assert all(abs(error) < (0.35 if name == "sgd" else 0.06) for error in errors.values()), errors


def test_small_layers_are_looked_at_whole() -> None:
    training = Training(adamw)
    training.step()
    training.measure()
    before = snapshot_model(training.model)
    training.step(3)
    found, truth = training.measure(), true_drift(training, before)
    assert found["norm"].relative == pytest.approx(truth["norm"], rel=1e-5)


def test_importance_update_and_rate_are_those_of_the_state() -> None:
    training = Training(adamw)
    training.step()
    training.measure()
    before = snapshot_model(training.model)
    training.step(3)
    found = training.measure()["norm"]
    (fqn,) = training.fqns("norm")
    weight = training.model.get_parameter(fqn)
    state = training.optimizer.state[weight]
    first, second = state["exp_avg"].double(), state["exp_avg_sq"].double()
    moved = (weight.detach() - before[fqn]).double()
    update = 1e-2 * (first / (1 - 0.9**4)) / ((second / (1 - 0.95**4)).sqrt() + 1e-8)
    assert found.importance == pytest.approx(float((second.sqrt() * moved.square()).sum()), rel=1e-5)
    assert found.update == pytest.approx(norm([update]) / norm([weight.detach()]), rel=1e-5)
    assert found.rate == pytest.approx(float((second.sqrt() * update.square()).sum()), rel=1e-5)
    assert found.momentum == pytest.approx(norm([first]), rel=1e-5)


def test_an_optimizer_without_second_moments_tells_no_importance() -> None:
    training = Training(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    training.step()
    training.measure()
    training.step()
    found = training.measure()["layers.0"]
    assert found.relative is not None
    assert found.relative > 0
    assert (found.importance, found.update, found.momentum, found.rate) == (None, None, None, None)


def test_momentum_of_sgd_is_its_update() -> None:
    training = Training(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    training.step(2)
    found = training.measure()["norm"]
    (fqn,) = training.fqns("norm")
    weight = training.model.get_parameter(fqn)
    momentum = training.optimizer.state[weight]["momentum_buffer"]
    assert found.update == pytest.approx(0.1 * norm([momentum]) / norm([weight.detach()]), rel=1e-5)
    assert found.importance is None or found.relative == 0


def test_what_does_not_move_matters_nothing_whatever_the_optimizer_keeps() -> None:
    training = Training(adamw)
    for fqn in training.fqns("layers.1"):
        training.model.get_parameter(fqn).requires_grad_(False)
    training.step()
    training.measure()
    training.step()
    frozen = training.measure()["layers.1"]
    assert (frozen.relative, frozen.importance) == (0.0, 0.0)
    assert training.measure()["layers.0"].importance > 0  # type: ignore[operator]


def test_masters_are_looked_at_in_place_of_weights_that_are_their_rounding() -> None:
    training = Training(lambda parameters: MasterAdamW(parameters, lr=1e-6), dtype=torch.bfloat16, width=64)
    training.step()
    training.measure()
    weights = [training.model.get_parameter(fqn) for fqn in training.fqns("norm")]
    before = snapshot_model(training.model)
    masters = [training.optimizer.state[weight][LEAF].clone() for weight in weights]
    training.step(2)
    found = training.measure()["norm"]
    moved = [training.optimizer.state[weight][LEAF] - master for weight, master in zip(weights, masters, strict=True)]
    assert true_drift(training, before)["norm"] == 0.0  # too little to be seen in bfloat16
    assert found.relative == pytest.approx(norm(moved) / norm(masters), rel=1e-4)
    assert found.importance is not None


def test_drift_is_since_the_save_that_a_layer_is_of() -> None:
    training = Training(adamw)
    training.step()
    training.note_save(1)
    training.step()
    first = {"norm": 1, "layers.0": 1}
    since_first = training.measure(first)
    training.note_save(2, first)
    assert training.measure({"norm": 2, "layers.0": 1})["norm"].relative == 0
    assert training.measure({"norm": 2, "layers.0": 1})["layers.0"] == since_first["layers.0"]


def test_a_save_that_failed_is_not_what_drift_is_measured_from() -> None:
    training = Training(adamw)
    training.step()
    training.note_save(1)
    training.step()
    since_first = training.measure({"norm": 1})["norm"].relative
    training.note_save(2, {"norm": 1})
    training.note_save(3, {"norm": 2})  # planned while 2 was in flight, which then failed
    assert training.measure({"norm": 1})["norm"].relative == since_first


def test_what_no_layer_goes_back_to_is_forgotten() -> None:
    training = Training(adamw)
    training.step()
    for step in range(1, 50):
        training.note_save(step, {layer.name: step - 1 for layer in training.live().layers})
    assert len(training.monitor._saved) <= 3


def test_a_weight_that_is_no_number_is_seen() -> None:
    training = Training(adamw)
    training.step()
    training.measure()
    (fqn,) = training.fqns("norm")
    with torch.no_grad():
        training.model.get_parameter(fqn)[0] = math.nan
    assert math.isnan(training.measure()["norm"].relative)  # type: ignore[arg-type]


def test_the_same_entries_are_picked_each_time_and_none_is_preferred() -> None:
    model = torch.nn.Linear(100, 1000, bias=False)
    counts = np.zeros(10)
    chooser = Chooser()
    for number in range(40):
        named = torch.nn.Module()
        named.add_module(f"block{number}", model)
        live = LiveReader().read(named, [])
        (layer,) = live.layers
        records = {record.fqn: record for record in live.tensors}
        (picks,) = pick_entries(live.images[layer.name], records, 100_000, chooser).weights
        (again,) = pick_entries(live.images[layer.name], records, 100_000, chooser).weights
        (elsewhere,) = pick_entries(live.images[layer.name], records, 100_000, Chooser()).weights
        assert picks.indices is again.indices
        assert torch.equal(picks.indices, elsewhere.indices)
        assert picks.indices.numel() == NUM_PICKS
        assert picks.indices.unique().numel() > 0.99 * NUM_PICKS  # stretches may share an entry at their border
        assert picks.scale == pytest.approx(100_000 / NUM_PICKS)
        counts += np.histogram(picks.indices % 100, bins=10, range=(0, 100))[0]  # each column as often as any other
    assert np.abs(counts / counts.mean() - 1).max() < 0.03


def test_sums_of_parts_are_those_of_the_whole() -> None:
    whole = Training(adamw)
    whole.step()
    parts: list[np.ndarray[Any, Any]] = []

    def keep(own: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        parts.append(own.copy())
        return own

    live = whole.live()
    half = {layer.name for number, layer in enumerate(live.layers) if number % 2}
    for mine in (half, {layer.name for layer in live.layers} - half):
        of_rank = LiveLayers(
            tensors=live.tensors,
            optimizers=live.optimizers,
            layers=live.layers,
            images={name: image for name, image in live.images.items() if name in mine},
            nbytes=live.nbytes,
            layout=None,
        )
        monitor = Monitor()
        monitor.measure(monitor.look(of_rank), of_rank, {}, add_up=keep)
    alone = Monitor()
    alone.measure(alone.look(live), live, {}, add_up=keep)
    np.testing.assert_allclose(parts[0] + parts[1], parts[2], rtol=1e-6)


class Experts(torch.nn.Module):
    """Blocks whose experts are modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = (torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3)) for _ in range(2))
        self.layers = torch.nn.ModuleList(blocks)
        self.optimizer = adamw(self.parameters())
        self.monitor, self._reader = Monitor(), LiveReader()

    def step(self, *experts: int) -> None:
        """Train those of each block; the others get no token."""
        self.optimizer.zero_grad()
        for layer in self.layers:
            sum(layer[number](torch.ones(8)).square().sum() for number in experts).backward()  # type: ignore[union-attr, index]
        self.optimizer.step()

    def measure(self) -> LayerDrift:
        live = self._reader.read(self, [self.optimizer])
        return self.monitor.measure(self.monitor.look(live), live, {})["layers.0"]


def test_an_expert_without_a_token_yet_makes_its_layer_no_mystery() -> None:
    training = Experts()
    training.step(0)
    training.measure()
    training.step(0)
    found = training.measure()
    moments = training.optimizer.state
    used = [training.layers[0][0].weight, training.layers[0][0].bias]  # type: ignore[index]
    assert found.importance is not None
    assert found.importance > 0
    assert found.rate is not None
    assert found.momentum == pytest.approx(norm([moments[each]["exp_avg"] for each in used]), rel=1e-5)
    # The next update is relative to all weights of the layer, also of experts that wait.
    assert found.update == pytest.approx(
        norm([_next_update(moments[each]) for each in used])
        / norm([each.detach() for each in training.layers[0].parameters()]),
        rel=1e-5,
    )


def _next_update(state: Mapping[str, torch.Tensor]) -> torch.Tensor:
    beta1, beta2 = ADAM["betas"]  # type: ignore[misc]
    count = float(state["step"])
    mean, square = (state[name].double() for name in ("exp_avg", "exp_avg_sq"))
    return 1e-2 * (mean / (1 - beta1**count)) / ((square / (1 - beta2**count)).sqrt() + 1e-8)


def test_an_expert_that_moved_and_has_no_state_is_a_mystery() -> None:
    training = Experts()
    training.step(0)
    training.measure()
    with torch.no_grad():
        training.layers[0][2].weight.add_(1)  # type: ignore[index]
    found = training.measure()
    assert found.relative is not None
    assert found.relative > 0
    assert (found.importance, found.update, found.rate) == (None, None, None)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_eight_bits_are_looked_at_too(dtype: torch.dtype) -> None:
    training = Experts()
    weight = torch.nn.Parameter(torch.full((16, 16), 0.5).to(dtype), requires_grad=False)
    training.layers[0].register_parameter("frozen", weight)
    training.step(0, 1, 2)
    training.measure()
    assert training.measure().relative == 0
    weight.data.copy_(torch.full((16, 16), 1.5))
    found = training.measure()
    others = norm([each.detach() for each in training.layers[0].parameters() if each is not weight])
    assert found.relative == pytest.approx(16 / math.hypot(8, others), rel=1e-5)
    assert found.importance is not None  # what is frozen has no say in what the optimizer tells


def test_gradients_are_those_of_the_latest_step_and_hold_no_model() -> None:
    norms = GradientNorms()
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    for each in weights:
        each.grad = torch.full((3,), 2.0)
    norms.note(optimizer)
    named = [(str(number), each) for number, each in enumerate(weights)]
    assert norms.squares(named) == {"0": pytest.approx(12), "1": pytest.approx(12)}
    weights[0].grad = None  # frozen since, or an expert without a token
    norms.note(optimizer)
    assert norms.squares(named) == {"1": pytest.approx(12)}
    gone = weakref.ref(weights[1])
    del weights, optimizer, named, each
    gc.collect()
    assert gone() is None
