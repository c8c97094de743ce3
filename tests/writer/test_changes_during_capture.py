"""State that something other than an optimizer's step changes while it is captured: the save fails and says why.

The capture thread is held up while the test makes the change, so every change comes too early; see ``Gate``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtailor.errors import IntegrityError, SaveFailedWarning
from llmtailor.storage import list_checkpoints
from llmtailor.verify import verify_checkpoint
from writer.trainings import Gate, Model, Training


def change_in_place(training: Training) -> None:
    with torch.no_grad():
        training.model.layers[2].mlp.weight.mul_(0.999)


def change_one_element(training: Training) -> None:
    """Anywhere: nobody looks at every byte, but torch counts."""
    with torch.no_grad():
        training.model.layers[1].back.weight[17, 31] = 0.5


def clip(training: Training) -> None:
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.clamp_(-0.1, 0.1)


def load_model(training: Training) -> None:
    state = {name: tensor + 1 for name, tensor in copy.deepcopy(training.model.state_dict()).items()}
    training.model.load_state_dict(state)


def write_through_data(training: Training) -> None:
    """torch does not count these: a few bytes of every tensor are compared."""
    weight = training.model.layers[0].attn.weight
    weight.data.copy_(torch.zeros_like(weight))


def swap_in_an_average(training: Training) -> None:
    """As most averages of weights do it, before an evaluation."""
    for parameter in training.model.parameters():
        parameter.data.mul_(0.5)


def change_the_optimizers_state(training: Training) -> None:
    training.optimizer.state[training.model.lm_head.weight]["exp_avg"].zero_()


def step_by_hand(training: Training) -> None:
    """A fused update that no hook knows of; torch does not count it either."""
    parameters = [each for each in training.model.parameters() if each.grad is not None]
    states = [training.optimizer.state[each] for each in parameters]
    torch._fused_adamw_(
        [each.detach() for each in parameters],
        [each.grad for each in parameters],
        [each["exp_avg"] for each in states],
        [each["exp_avg_sq"] for each in states],
        [],
        [each["step"] for each in states],
        lr=0.1,
        beta1=0.9,
        beta2=0.999,
        weight_decay=0.1,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=None,
    )


def look_up_with_a_norm(training: Training) -> None:
    """``Embedding(max_norm=...)`` renormalizes the rows it looks up, in forward."""
    training.model(torch.arange(8))


def free(training: Training) -> None:
    """As what shards or offloads parameters does after a step."""
    training.model.lm_head.weight.untyped_storage().resize_(0)


def exchange_the_memory(training: Training) -> None:
    weight = training.model.lm_head.weight
    weight.untyped_storage().resize_(0)
    blocker = torch.empty(weight.numel() + 1000)
    weight.untyped_storage().resize_(weight.nbytes + 4096)
    del blocker


CHANGES: dict[str, tuple[Callable[[Training], None], str]] = {
    "in place": (change_in_place, "layers.2.mlp.weight"),
    "one element": (change_one_element, "layers.1.back.weight"),
    "clipping": (clip, "embed_tokens.weight"),
    "load_state_dict": (load_model, "embed_tokens.weight"),
    "through .data": (write_through_data, "layers.0.attn.weight"),
    "average swapped in": (swap_in_an_average, "embed_tokens.weight"),
    "optimizer state": (change_the_optimizers_state, "state.lm_head.weight.exp_avg"),
    "fused update by hand": (step_by_hand, "embed_tokens.weight"),
    "embedding with a norm": (look_up_with_a_norm, "embed_tokens.weight"),
    "freed": (free, "lm_head.weight"),
    "other memory": (exchange_the_memory, "lm_head.weight"),
}


def new_training(directory: Path, change: str, **options: Any) -> Training:
    model = Model(max_norm=0.5 if "norm" in change else None)
    training = Training(directory=directory / "run", model=model, options=options)
    training.train()
    return training


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_comes_too_early_fails_that_save_alone(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    training = new_training(fast_directory, change)
    first = training.save()
    if "norm" in change:  # it changes the state in every forward: the save before waits for its capture
        first.captured()
    training.train()
    first.result()

    gate = Gate(monkeypatch)
    handle = training.save()
    gate.wait_until_reached()
    make, name = CHANGES[change]
    make(training)
    gate.open()
    with pytest.raises(IntegrityError) as caught:
        handle.result()
    assert caught.value.kind == "changed-during-capture"
    assert caught.value.fqn == name
    assert "captured" in str(caught.value.hint)
    with pytest.warns(SaveFailedWarning, match=f"checkpoint-2 was not saved(.|\n)*{name}"):
        training.checkpointer.collect()
    assert [entry.step for entry in list_checkpoints(training.directory)] == [1]
    assert verify_checkpoint(first.result()).is_good
    training.check(first.result())

    if change in {"freed", "other memory"}:
        training.model.lm_head = torch.nn.Linear(48, 64)
        training.optimizer = torch.optim.AdamW(training.model.parameters())
    training.train()
    later = training.save()
    assert later.state != "capturing", "from now on the state is captured before a save returns"
    if change != "freed":
        make(training)
    training.check(later.result())
    training.close()


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_waits_for_the_capture_does_no_harm(fast_directory: Path, change: str) -> None:
    training = new_training(fast_directory, change)
    for wait in (training.checkpointer.wait_until_captured, lambda: training.handles[-1].captured()):
        handle = training.save()
        wait()
        CHANGES[change][0](training)
        training.check(handle.result())
        if change in {"freed", "other memory"}:
            break
        training.train()
    training.close()


def test_with_blocking_capture_any_change_may_follow(fast_directory: Path) -> None:
    training = new_training(fast_directory, "", capture="blocking")
    for change in ("in place", "load_state_dict", "through .data", "fused update by hand", "average swapped in"):
        handle = training.save()
        CHANGES[change][0](training)
        training.check(handle.result())
        training.train()
    training.close()


def test_a_save_before_the_change_in_another_run_is_not_harmed_by_a_later_one(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three saves in flight only the one that was not captured yet is torn, and those behind it are fine."""
    training = new_training(fast_directory, "", max_in_flight=3)
    first = training.save()
    first.captured()
    training.train()
    gate = Gate(monkeypatch)
    second = training.save()
    gate.wait_until_reached()
    change_in_place(training)
    training.step += 1
    third = training.save()
    gate.open()
    training.check(first.result())
    with pytest.raises(IntegrityError):
        second.result()
    training.check(third.result())
    with pytest.warns(SaveFailedWarning):
        training.checkpointer.collect()
    training.close()


# What looks like a change and is none


def move_to_another_type(training: Training) -> None:
    training.model.half()


def assign_new_parameters(training: Training) -> None:
    for module in training.model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(parameter.detach() * 2))


def drop_everything(training: Training) -> None:
    training.model = Model()
    training.optimizer = torch.optim.AdamW(training.model.parameters())


def empty_the_optimizer(training: Training) -> None:
    training.optimizer.state.clear()


@pytest.mark.parametrize(
    "replace",
    [move_to_another_type, assign_new_parameters, drop_everything, empty_the_optimizer],
    ids=lambda replace: replace.__name__,
)
def test_memory_that_is_replaced_is_captured_as_it_was(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch, replace: Callable[[Training], None]
) -> None:
    """The save holds on to the memory, whoever lets go of it."""
    training = new_training(fast_directory, "")
    gate = Gate(monkeypatch)
    handle = training.save()
    gate.wait_until_reached()
    replace(training)
    [torch.full((48, 96), torch.nan) for _ in range(50)]  # whatever was freed is overwritten
    gate.open()
    training.check(handle.result())
    training.close()


def test_gradients_and_buffers_may_change_at_any_time(fast_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = new_training(fast_directory, "")
    gate = Gate(monkeypatch)
    handle = training.save()
    gate.wait_until_reached()
    training.backward()
    torch.nn.utils.clip_grad_norm_(training.model.parameters(), 0.1)
    with torch.no_grad():
        for buffer in training.model.buffers():
            buffer.zero_()
    training.optimizer.zero_grad()
    gate.open()
    training.check(handle.result())
    training.close()


def test_a_frozen_parameter_may_be_changed_by_nobody_either(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = new_training(fast_directory, "")
    training.model.embed_tokens.weight.requires_grad_(False)
    gate = Gate(monkeypatch)
    handle = training.save()
    gate.wait_until_reached()
    training.model.embed_tokens.weight.zero_()
    gate.open()
    with pytest.raises(IntegrityError) as caught:
        handle.result()
    assert caught.value.fqn == "embed_tokens.weight"
    with pytest.warns(SaveFailedWarning):
        training.checkpointer.collect()
    with pytest.raises(IntegrityError):
        training.close()


def test_the_change_is_in_the_part_that_is_copied_already(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a tensor's last byte was copied, nobody can tell; the save fails to be on the safe side."""
    training = new_training(fast_directory, "", pool_nbytes=2**16)
    gate = Gate(monkeypatch, num_let_through=8)
    handle = training.save()
    gate.wait_until_reached()
    with torch.no_grad():
        training.model.embed_tokens.weight.add_(1)
    gate.open()
    with pytest.raises(IntegrityError):
        handle.result()
    with pytest.warns(SaveFailedWarning):
        training.checkpointer.collect()
    training.train()
    training.check(training.save().result())
    training.close()


def test_tensors_made_in_inference_mode_are_compared_by_their_bytes(
    fast_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They count no changes."""
    training = new_training(fast_directory, "")
    with torch.inference_mode():
        frozen = torch.nn.Parameter(torch.zeros(48, 64), requires_grad=False)
    training.model.lm_head.weight = torch.nn.Parameter(torch.zeros(64, 48))
    training.model.extra = torch.nn.ParameterList([frozen])
    training.optimizer = torch.optim.SGD([training.model.lm_head.weight], lr=0.1)
    gate = Gate(monkeypatch)
    handle = training.save()
    gate.wait_until_reached()
    with torch.inference_mode():
        frozen.fill_(3)
    gate.open()
    with pytest.raises(IntegrityError) as caught:
        handle.result()
    assert caught.value.fqn == "extra.0"
    with pytest.warns(SaveFailedWarning):
        training.checkpointer.collect()
    with pytest.raises(IntegrityError):
        training.close()
