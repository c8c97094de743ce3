from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from llmtailor.errors import FormatError, IncompatibleError, UnsupportedError
from llmtailor.optimizer_check import check_state
from llmtailor.optimizer_state import (
    ParameterGroup,
    ParameterState,
    load_groups,
    load_parameter_state,
    optimizer_class,
    parameter_names,
    read_groups,
    read_state,
    unwrap_optimizer,
    update_count,
)
from llmtailor.state_keys import split_state_key, state_key
from llmtailor.tensor_bytes import meta_of
from llmtailor.tensors import TensorMeta
from tensor_content import host_bytes, tensor_from_bytes

Groups = list[dict[str, Any]]


class OddOptimizer(Optimizer):
    """As third parties write them: odd shapes, codes, nested state, Python numbers, text and None."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1, weight_decay: float = 0.0) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "window": (2, [3, None]), "scale_fn": None, "k": 0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, self.state[parameter], group)

    def _update(self, parameter: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: Any) -> None:
        if not state:
            state.update(step=0, mode="cold", norm=0.0, is_warm=False, anchor=None)
            state["row"] = grad.new_zeros(grad.shape[0], 1)
            codes = torch.zeros(grad.numel(), dtype=torch.uint8)
            state["quant"] = {"codes": codes, "maps": (torch.ones(3), [None, {}])}
        state["step"] += 1
        state["row"] += grad.reshape(grad.shape[0], -1).square().mean(1, keepdim=True)
        state["norm"] = float(grad.norm()) + 0.5 * state["norm"]
        state["quant"]["codes"] += (grad.flatten() > 0).to(torch.uint8)
        state["quant"]["maps"][0].mul_(1.0 + 0.1 * float(state["quant"]["codes"].float().mean()))
        factor = state["norm"] * state["step"] * state["quant"]["maps"][0].sum() * (2 if state["mode"] == "cold" else 1)
        if state["step"] == 2:
            state.update(mode="warm", is_warm=True, anchor=parameter.clone())
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        flat = parameter.view(grad.shape[0], -1)
        flat.sub_(group["lr"] * grad.reshape_as(flat) / (1.0 + state["row"].sqrt() + factor / group["k"]))


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 4)
        self.frozen = nn.Linear(8, 8, bias=False).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.frozen(self.norm(torch.tanh(self.first(x)))))


def make_model(dtype: torch.dtype = torch.float32) -> TinyModel:
    torch.manual_seed(0)
    return TinyModel().to(dtype)


def train(model: nn.Module, optimizers: Iterable[Optimizer], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(5, 6, generator=generator).to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def decay_groups(model: nn.Module) -> Groups:
    """Two groups with other options, in model order."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1, "lr": 0.03},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def single_groups(model: nn.Module) -> Groups:
    """A group for each parameter, last first, with options of no meaning."""
    return [{"params": [p], "weight_decay": 0.7} for p in reversed(list(model.parameters()))]


@dataclass(frozen=True)
class Stored:
    """An optimizer as files hold it: bytes, shapes and JSON."""

    optimizer_class: str
    metas: Mapping[str, Mapping[str, TensorMeta]]
    content: Mapping[str, bytes]
    notes: Mapping[str, Any]
    groups: tuple[ParameterGroup, ...]

    def tensors(self, fqn: str) -> dict[str, torch.Tensor]:
        metas = self.metas[fqn]
        return {leaf: tensor_from_bytes(self.content[state_key(fqn, leaf)], meta) for leaf, meta in metas.items()}


def store(optimizer: Optimizer, names: Mapping[torch.Tensor, str]) -> Stored:
    states = read_state(optimizer, names)
    groups = [(group.parameters, dict(group.options)) for group in read_groups(optimizer, names)]
    return Stored(
        optimizer_class=optimizer_class(optimizer),
        metas={fqn: {leaf: meta_of(tensor) for leaf, tensor in s.tensors.items()} for fqn, s in states.items()},
        content={
            state_key(fqn, leaf): bytes(host_bytes(tensor))
            for fqn, state in states.items()
            for leaf, tensor in state.tensors.items()
        },
        notes=json.loads(json.dumps({fqn: dict(state.notes) for fqn, state in states.items()})),
        groups=tuple(
            ParameterGroup(parameters=tuple(fqns), options=options)
            for fqns, options in json.loads(json.dumps(groups, allow_nan=False))
        ),
    )


def load(stored: Stored, optimizer: Optimizer, names: Mapping[torch.Tensor, str]) -> None:
    check_state(optimizer, names, stored.metas, stored.groups, stored.optimizer_class, notes=stored.notes)
    load_groups(optimizer, names, stored.groups)
    for parameter, fqn in names.items():
        if fqn in stored.metas:
            load_parameter_state(optimizer, parameter, fqn, stored.tensors(fqn), stored.notes[fqn])


def by_name(optimizer: Optimizer, names: Mapping[torch.Tensor, str]) -> dict[str, Any]:
    """State and options of each parameter, for comparison with ``assert_same``."""
    return {
        names[parameter]: {
            "state": dict(optimizer.state.get(parameter, {})),
            "options": {name: value for name, value in group.items() if name != "params"},
        }
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def assert_same(a: object, b: object, where: str = "") -> None:
    """Equal bit for bit and type for type."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        assert (a.dtype, a.device, a.stride()) == (b.dtype, b.device, b.stride()), where
        assert bytes(host_bytes(a)) == bytes(host_bytes(b)), where
    elif isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{index}]")
    else:
        assert repr(a) == repr(b), where


OPTIMIZERS: dict[str, Callable[[Groups], Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adamw_foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
    "adamw_fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "adamw_amsgrad": lambda groups: torch.optim.AdamW(groups, amsgrad=True, capturable=False),
    "adamw_tensor_lr": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(0.01)),
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "sgd_momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, momentum=0.5, centered=True),
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "asgd": torch.optim.ASGD,
    "adafactor": torch.optim.Adafactor,
    "odd": OddOptimizer,
}


def assert_resumes_exactly(make_groups: Callable[[nn.Module], Groups], build: Callable[[Groups], Optimizer]) -> None:
    model = make_model()
    optimizer = build(make_groups(model))
    names = parameter_names(model.named_parameters())
    train(model, [optimizer], range(3))
    stored = store(optimizer, names)
    saved_model = copy.deepcopy(model.state_dict())
    train(model, [optimizer], range(3, 6))

    resumed = make_model()
    resumed.load_state_dict(saved_model)
    fresh = build(single_groups(resumed))
    fresh_names = parameter_names(resumed.named_parameters())
    load(stored, fresh, fresh_names)
    train(resumed, [fresh], range(3, 6))
    assert_same(dict(resumed.state_dict()), dict(model.state_dict()))
    assert_same(by_name(fresh, fresh_names), by_name(optimizer, names))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumes_exactly_whatever_grouping_and_order(name: str) -> None:
    assert_resumes_exactly(decay_groups, OPTIMIZERS[name])


def test_resumes_exactly_after_options_were_scheduled() -> None:
    def build(groups: Groups) -> Optimizer:
        optimizer = torch.optim.AdamW(groups)
        for group in optimizer.param_groups:
            group["lr"] *= 0.3
        return optimizer

    assert_resumes_exactly(decay_groups, build)


def test_muon_and_adamw_together_resume_exactly() -> None:
    def build(model: nn.Module) -> list[Optimizer]:
        parameters = list(model.parameters())
        matrices = [p for p in parameters if p.ndim == 2]
        rest = [p for p in parameters if p.ndim != 2]
        return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest)]

    model, resumed = make_model(), make_model()
    optimizers, fresh = build(model), build(resumed)
    names, fresh_names = parameter_names(model.named_parameters()), parameter_names(resumed.named_parameters())
    train(model, optimizers, range(3))
    stored = [store(optimizer, names) for optimizer in optimizers]
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    for saved, optimizer in zip(stored, fresh, strict=True):
        load(saved, optimizer, fresh_names)
    train(model, optimizers, range(3, 6))
    train(resumed, fresh, range(3, 6))
    assert_same(dict(resumed.state_dict()), dict(model.state_dict()))
    for a, b in zip(optimizers, fresh, strict=True):
        assert_same(by_name(a, names), by_name(b, fresh_names))


def test_fp32_moments_of_bf16_parameters_stay_fp32() -> None:
    model, resumed = make_model(torch.bfloat16), make_model(torch.bfloat16)
    optimizer, fresh = (torch.optim.AdamW(decay_groups(m), foreach=False) for m in (model, resumed))
    names, fresh_names = parameter_names(model.named_parameters()), parameter_names(resumed.named_parameters())
    for parameter in model.parameters():
        moments = {name: torch.rand(parameter.shape) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(7.0), **moments}
    before = copy.deepcopy(by_name(optimizer, names))
    load(store(optimizer, names), fresh, fresh_names)
    assert_same(by_name(fresh, fresh_names), before)
    assert fresh.state[resumed.first.weight]["exp_avg"].dtype == torch.float32


def test_state_of_channels_last_parameter_keeps_its_strides() -> None:
    weight = nn.Parameter(torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last))
    weight.grad = torch.rand_like(weight)
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()
    before = copy.deepcopy(dict(optimizer.state[weight]))
    load(store(optimizer, {weight: "w"}), optimizer, {weight: "w"})
    assert_same(dict(optimizer.state[weight]), before)


def test_read_state_has_every_parameter_and_adds_nothing_to_the_optimizer() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(decay_groups(model))
    train(model, [optimizer], range(1))
    names = parameter_names(model.named_parameters())
    count = len(optimizer.state)
    states = read_state(optimizer, names)
    assert states.keys() == set(names.values())
    assert states["unused"] == ParameterState(tensors={}, notes={}) == states["frozen.weight"]
    assert len(optimizer.state) == count
    exp_avg = states["first.weight"].tensors["exp_avg"]
    assert exp_avg.data_ptr() == optimizer.state[model.first.weight]["exp_avg"].data_ptr()


def test_read_groups_leaves_the_names_out_that_torch_keeps() -> None:
    model = make_model()
    optimizer = torch.optim.SGD([{"params": list(model.named_parameters()), "lr": 0.5}])
    (group,) = read_groups(optimizer, parameter_names(model.named_parameters()))
    assert group.parameters == tuple(name for name, _ in model.named_parameters())
    assert group.options["lr"] == 0.5
    assert not {"params", "param_names"} & group.options.keys()


def test_parameter_names_takes_the_first_of_tied_names(weight: nn.Parameter) -> None:
    assert parameter_names([("embed.weight", weight), ("lm_head.weight", weight)]) == {weight: "embed.weight"}


def test_parameter_names_refuses_two_parameters_of_one_name() -> None:
    with pytest.raises(IncompatibleError) as caught:
        parameter_names([("w", nn.Parameter(torch.ones(2))), ("w", nn.Parameter(torch.ones(2)))])
    assert (caught.value.kind, caught.value.fqn) == ("duplicate-parameter-name", "w")


@pytest.mark.parametrize("read", [read_state, read_groups])
def test_parameter_without_a_name_is_refused(read: Callable[..., object]) -> None:
    model = make_model()
    stranger = nn.Parameter(torch.ones(3, 5))
    optimizer = torch.optim.SGD([{"params": list(model.parameters())}, {"params": [stranger]}])
    with pytest.raises(IncompatibleError) as caught:
        read(optimizer, parameter_names(model.named_parameters()))
    assert caught.value.kind == "unnamed-parameter"
    assert "group 1" in str(caught.value)
    assert "[3, 5]" in str(caught.value)


def test_state_that_no_file_can_hold_is_refused_by_parameter_key_and_type(weight: nn.Parameter) -> None:
    optimizer = torch.optim.SGD([weight])
    optimizer.state[weight] = {"projector": object()}
    with pytest.raises(UnsupportedError) as caught:
        read_state(optimizer, {weight: "layers.0.weight"})
    for fact in ("layers.0.weight", "'projector'", "object"):
        assert fact in str(caught.value)


def test_state_of_no_parameter_is_refused(weight: nn.Parameter) -> None:
    optimizer = torch.optim.SGD([weight])
    optimizer.state["global"] = {"k": 1}
    with pytest.raises(UnsupportedError) as caught:
        read_state(optimizer, {weight: "w"})
    assert "state['global']" in str(caught.value)


def test_option_that_json_cannot_say_is_refused_by_group_and_name(weight: nn.Parameter) -> None:
    optimizer = torch.optim.SGD([weight])
    optimizer.param_groups[0]["schedule"] = len
    with pytest.raises(UnsupportedError) as caught:
        read_groups(optimizer, {weight: "w"})
    for fact in ("group 0", "'schedule'", "builtin_function"):
        assert fact in str(caught.value)


@pytest.mark.parametrize("leaf", ["exp_avg", "quant/codes", "a%2Eb"])
def test_split_state_key_is_the_inverse_of_state_key(leaf: str) -> None:
    assert split_state_key(state_key("model.layers.0.weight", leaf)) == ("model.layers.0.weight", leaf)


@pytest.mark.parametrize("key", ["", "state", "state.w", "state.w.", "state..step", "param_groups.w.lr"])
def test_split_state_key_refuses_other_names(key: str) -> None:
    with pytest.raises(IncompatibleError) as caught:
        split_state_key(key)
    assert caught.value.kind == "state-key"


@pytest.mark.parametrize("name", ["adamw", "odd"])
def test_update_count_is_the_parameters_own(name: str) -> None:
    model = make_model()
    optimizer = OPTIMIZERS[name](decay_groups(model))
    train(model, [optimizer], range(3))
    states = read_state(optimizer, parameter_names(model.named_parameters()))
    assert update_count(states["first.weight"]) == 3
    assert update_count(states["unused"]) is None


def test_update_count_is_none_where_nothing_counts() -> None:
    assert update_count(ParameterState(tensors={"exp_avg": torch.ones(2)}, notes={})) is None


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(2))


class PlainWrapper:
    def __init__(self, optimizer: object) -> None:
        self.optimizer = optimizer


class StatefulWrapper(Optimizer):
    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer


def make_sgd() -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.ones(2))])


def test_unwrap_optimizer_reaches_the_innermost() -> None:
    optimizer = make_sgd()
    assert unwrap_optimizer(optimizer) is optimizer
    assert unwrap_optimizer(PlainWrapper(PlainWrapper(optimizer))) is optimizer


def test_unwrap_optimizer_of_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    optimizer = make_sgd()
    wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert type(wrapped) is not type(optimizer)
    assert unwrap_optimizer(wrapped) is optimizer
    assert optimizer_class(wrapped) == "torch.optim.sgd.SGD"


@pytest.mark.parametrize("wrapped", [object(), PlainWrapper(object()), StatefulWrapper(make_sgd())], ids=type)
def test_unwrap_optimizer_refuses_what_it_would_lose(wrapped: object) -> None:
    with pytest.raises(UnsupportedError) as caught:
        unwrap_optimizer(wrapped)
    assert caught.value.kind == "optimizer-type"


def test_loaded_state_does_not_alias_the_buffer(weight: nn.Parameter) -> None:
    optimizer = torch.optim.SGD([weight], momentum=0.9)
    buffer = bytearray(host_bytes(torch.ones(2)))
    tensor = tensor_from_bytes(buffer, TensorMeta(dtype="F32", shape=(2,)))
    load_parameter_state(optimizer, weight, "w", {"momentum_buffer": tensor}, {})
    buffer[:] = bytes(8)
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [1.0, 1.0]


def test_loading_an_empty_state_removes_the_live_one(weight: nn.Parameter) -> None:
    optimizer = torch.optim.SGD([weight], momentum=0.9)
    optimizer.state[weight] = {"momentum_buffer": torch.ones(2)}
    load_parameter_state(optimizer, weight, "w", {}, {})
    assert weight not in optimizer.state


def test_loading_misfitting_notes_changes_nothing(weight: nn.Parameter) -> None:
    optimizer = torch.optim.SGD([weight], momentum=0.9)
    optimizer.state[weight] = {"momentum_buffer": torch.ones(2)}
    before = copy.deepcopy(optimizer.state[weight])
    with pytest.raises(FormatError):
        load_parameter_state(optimizer, weight, "w", {"momentum_buffer": torch.zeros(2)}, {"step": "int"})
    assert_same(optimizer.state[weight], before)


@pytest.mark.parametrize(("option", "device"), [(None, "cpu"), ("capturable", "meta"), ("fused", "meta")])
def test_step_stays_on_the_cpu_unless_the_group_keeps_it_on_the_device(option: str | None, device: str) -> None:
    weight = nn.Parameter(torch.ones(2, device="meta"))  # stands for an accelerator
    optimizer = torch.optim.SGD([weight])
    if option is not None:
        optimizer.param_groups[0][option] = True
    tensors = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}
    load_parameter_state(optimizer, weight, "w", tensors, {})
    state = optimizer.state[weight]
    assert (state["step"].device.type, state["exp_avg"].device.type) == (device, "meta")


def make_group(fqns: Iterable[str], **options: object) -> ParameterGroup:
    return ParameterGroup(parameters=tuple(fqns), options=options)


def test_load_groups_writes_a_tensor_option_in_place(weight: nn.Parameter) -> None:
    lr = torch.tensor(0.1)
    optimizer = torch.optim.SGD([weight], lr=lr)
    load_groups(optimizer, {weight: "w"}, [make_group(["w"], lr={"tensor": 0.25, "dtype": "F32"})])
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.25


def test_load_groups_parts_a_tensor_option_that_groups_share() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=torch.tensor(0.1))
    groups = [make_group([fqn], lr={"tensor": lr, "dtype": "F32"}) for fqn, lr in (("a", 0.25), ("b", 0.5))]
    load_groups(optimizer, {a: "a", b: "b"}, groups)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25, 0.5]


@pytest.mark.parametrize(("live", "saved"), [(torch.tensor(0.1), 0.3), (0.1, {"tensor": 0.3, "dtype": "F64"})])
def test_load_groups_keeps_the_saved_type(weight: nn.Parameter, live: Any, saved: object) -> None:
    optimizer = torch.optim.SGD([weight], lr=live)
    load_groups(optimizer, {weight: "w"}, [make_group(["w"], lr=saved)])
    assert isinstance(optimizer.param_groups[0]["lr"], float if saved == 0.3 else torch.Tensor)
    assert float(optimizer.param_groups[0]["lr"]) == 0.3


def test_load_groups_keeps_live_options_the_saved_group_lacks(weight: nn.Parameter) -> None:
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    load_groups(optimizer, {weight: "w"}, [make_group(["w"], lr={"float": "inf"})])
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert optimizer.param_groups[0]["lr"] == math.inf
