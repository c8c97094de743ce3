from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from llmtailor.errors import FormatError, IncompatibleError
from llmtailor.optimizer_check import check_state
from llmtailor.optimizer_state import ParameterGroup, optimizer_class, read_groups, read_state
from llmtailor.tensor_bytes import meta_of
from llmtailor.tensors import TensorMeta

Metas = dict[str, dict[str, TensorMeta]]
Build = Callable[[list[dict[str, Any]]], Optimizer]


class Subject:
    """An optimizer of two parameters in a group each, and what was saved of it after one step."""

    def __init__(self, build: Build = torch.optim.AdamW) -> None:
        self.a, self.b = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4))
        self.names = {self.a: "a", self.b: "b"}
        self.build = build
        self.optimizer = build([{"params": [self.a], "weight_decay": 0.1}, {"params": [self.b], "weight_decay": 0.0}])
        for parameter in (self.a, self.b):
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        states = read_state(self.optimizer, self.names)
        self.metas: Metas = {fqn: {k: meta_of(t) for k, t in s.tensors.items()} for fqn, s in states.items()}
        self.notes = {fqn: state.notes for fqn, state in states.items()}
        self.groups = read_groups(self.optimizer, self.names)

    def fresh(self) -> Optimizer:
        return self.build([{"params": [self.b]}, {"params": [self.a]}])

    def check(self, optimizer: Optimizer | None = None, **changed: Any) -> None:
        given = {"saved": self.metas, "groups": self.groups, "saved_class": optimizer_class(self.optimizer)}
        check_state(optimizer or self.fresh(), self.names, **{**given, "notes": self.notes, **changed})

    def fault(self, optimizer: Optimizer | None = None, **changed: Any) -> IncompatibleError:
        """The error, after a look that nothing was changed."""
        optimizer = optimizer or self.fresh()
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(IncompatibleError) as caught:
            self.check(optimizer, **changed)
        assert str(optimizer.state_dict()) == str(before)
        assert caught.value.kind == "optimizer-mismatch"
        return caught.value


def with_leaf(metas: Metas, fqn: str, leaf: str, shape: tuple[int, ...]) -> Metas:
    return {**metas, fqn: {**metas[fqn], leaf: TensorMeta(dtype="F32", shape=shape)}}


def with_option(group: ParameterGroup, **options: object) -> ParameterGroup:
    return ParameterGroup(parameters=group.parameters, options={**group.options, **options})


BUILDERS: dict[str, Build] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
    "nadam": torch.optim.NAdam,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_state_fits_the_optimizer_it_came_from_and_a_fresh_one(name: str) -> None:
    subject = Subject(BUILDERS[name])
    subject.check(subject.optimizer)
    subject.check(subject.fresh())


def test_state_of_lists_fits_whatever_their_length() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.LBFGS([weight], max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight.square() * torch.tensor([1.0, 2.0, 3.0])).sum()
        loss.backward()
        return loss

    saved = []
    for _ in range(3):
        optimizer.step(closure)
        saved.append(read_state(optimizer, {weight: "w"})["w"])
    metas = {leaf: meta_of(tensor) for leaf, tensor in saved[1].tensors.items()}
    assert metas.keys() != saved[2].tensors.keys()
    groups = read_groups(optimizer, {weight: "w"})
    check_state(optimizer, {weight: "w"}, {"w": metas}, groups, optimizer_class(optimizer), notes={"w": saved[1].notes})


def test_empty_saved_state_fits_live_state() -> None:
    subject = Subject()
    subject.check(subject.optimizer, saved={"a": {}, "b": {}})


def test_another_class_is_a_fault() -> None:
    fault = Subject().fault(saved_class="torch.optim.adam.Adam")
    assert (fault.expected, fault.found) == ("torch.optim.adamw.AdamW", "torch.optim.adam.Adam")


def test_saved_parameter_that_the_optimizer_lacks_is_a_fault() -> None:
    subject = Subject()
    fault = subject.fault(torch.optim.AdamW([subject.a]))
    assert fault.fqn == "b"
    assert "does not have" in str(fault)


def test_parameter_that_the_checkpoint_lacks_is_a_fault() -> None:
    subject = Subject()
    fault = subject.fault(saved={"a": subject.metas["a"]}, groups=subject.groups[:1], notes={})
    assert fault.fqn == "b"
    assert "does not know" in str(fault)


def test_missing_state_of_a_grouped_parameter_is_a_fault() -> None:
    subject = Subject()
    fault = subject.fault(saved={"a": subject.metas["a"]})
    assert fault.fqn == "b"
    assert "missing" in str(fault)


@pytest.mark.parametrize("count", [0, 2])
def test_saved_parameter_must_be_in_one_group(count: int) -> None:
    subject = Subject()
    fault = subject.fault(groups=[subject.groups[0], *[subject.groups[1]] * count])
    assert (fault.fqn, fault.expected, fault.found) == ("b", "1 group", f"{count} groups")


@pytest.mark.parametrize("is_fresh", [True, False])
@pytest.mark.parametrize(
    ("name", "leaf", "expected"),
    [("adamw", "exp_avg", [4, 3]), ("adafactor", "row_var", [4, 1]), ("adafactor", "col_var", [1, 3])],
)
def test_another_shape_is_a_fault(name: str, leaf: str, expected: list[int], is_fresh: bool) -> None:
    subject = Subject(BUILDERS[name])
    optimizer = subject.fresh() if is_fresh else subject.optimizer
    fault = subject.fault(optimizer, saved=with_leaf(subject.metas, "a", leaf, (3, 4)))
    assert (fault.fqn, fault.expected, fault.found) == ("a", expected, [3, 4])
    assert leaf in str(fault)


def test_shapes_for_a_fresh_optimizer_of_another_maker_are_not_guessed() -> None:
    class LowRank(torch.optim.AdamW):
        pass

    subject = Subject(LowRank)
    subject.check(subject.fresh(), saved=with_leaf(subject.metas, "a", "exp_avg", (1, 3)))


def test_state_unknown_to_the_live_one_is_a_fault() -> None:
    subject = Subject()
    fault = subject.fault(subject.optimizer, saved=with_leaf(subject.metas, "a", "max_exp_avg_sq", (4, 3)))
    assert fault.fqn == "a"
    assert "'max_exp_avg_sq' is not known" in str(fault)


def test_live_state_that_was_not_saved_is_a_fault() -> None:
    subject = Subject()
    saved = {**subject.metas, "a": {"step": subject.metas["a"]["step"], "exp_avg": subject.metas["a"]["exp_avg"]}}
    fault = subject.fault(subject.optimizer, saved=saved)
    assert (fault.fqn, fault.expected) == ("a", [4, 3])
    assert "'exp_avg_sq' was not saved" in str(fault)


def test_group_of_parameters_saved_with_other_options_is_a_fault() -> None:
    subject = Subject()
    fault = subject.fault(torch.optim.AdamW([subject.a, subject.b]))
    assert (fault.fqn, fault.expected, fault.found) == ("b", 0.1, 0.0)
    assert "'weight_decay'" in str(fault)
    assert "together with a" in str(fault)


def test_options_that_only_some_saved_groups_have_are_a_fault() -> None:
    subject = Subject()
    groups = [with_option(subject.groups[0], initial_lr=0.1, weight_decay=0.0), subject.groups[1]]
    fault = subject.fault(torch.optim.AdamW([subject.a, subject.b]), groups=groups)
    assert (fault.fqn, fault.expected, fault.found) == ("b", 0.1, "nothing")


def test_unknown_option_is_a_fault() -> None:
    subject = Subject()
    fault = subject.fault(groups=[subject.groups[0], with_option(subject.groups[1], warmth=3)])
    assert fault.found == 3
    assert "'warmth'" in str(fault)


def test_options_that_schedulers_add_are_welcome() -> None:
    subject = Subject()
    subject.check(groups=[with_option(group, initial_lr=0.1) for group in subject.groups])


def test_options_that_the_saved_group_lacks_are_welcome() -> None:
    subject = Subject()
    groups = [ParameterGroup(parameters=group.parameters, options={"lr": 0.1}) for group in subject.groups]
    subject.check(groups=groups)


def test_all_faults_are_told_at_once() -> None:
    subject = Subject()
    metas = with_leaf(with_leaf(subject.metas, "a", "exp_avg", (3, 4)), "b", "exp_avg_sq", (5,))
    text = str(subject.fault(torch.optim.AdamW([subject.a, subject.b]), saved=metas))
    assert "in 3 ways" in text
    for fact in ("a: state 'exp_avg'", "b: state 'exp_avg_sq'", "[5]", "'weight_decay'", "found 0.0"):
        assert fact in text


def test_another_class_is_told_alone() -> None:
    subject = Subject()
    metas = with_leaf(subject.metas, "a", "exp_avg", (3, 4))
    fault = subject.fault(torch.optim.AdamW([subject.a, subject.b]), saved=metas, saved_class="other.Adam")
    assert (fault.expected, fault.found) == ("torch.optim.adamw.AdamW", "other.Adam")
    assert fault.fqn is None


@pytest.mark.parametrize(
    ("changed", "kind"),
    [
        ({"notes": {"a": {"step": "int"}}}, "optimizer-notes"),
        ({"notes": {"c": {"step": "float"}}}, "optimizer-notes"),
        ({"groups": [ParameterGroup(parameters=("a", "b"), options={"lr": {"unheard": 1}})]}, "option-encoding"),
    ],
)
def test_notes_and_options_that_are_not_ours_are_refused(changed: Mapping[str, object], kind: str) -> None:
    with pytest.raises(FormatError) as caught:
        Subject().check(**changed)
    assert caught.value.kind == kind
