"""One step count for many parameters: what a flat tensor has, where layers were saved at different counts.

Adam divides its moments by ``1 - beta^step``, because they start from zero. A layer that was saved at count s and goes
on with count S would be divided by the wrong number; so its moments are multiplied by ``(1 - beta^S) / (1 - beta^s)``,
and what Adam computes from them stays what it was.

Source: torch 2.13, optim/adam.py (_single_tensor_adam, max_exp_avg_sqs is corrected like exp_avg_sq); DeepSpeed 0.19.8,
ops/adam/fused_adam.py (bias_correction).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ...catalog import StateRef
from ...errors import IncompatibleError
from ...tensor_refs import ScaledTensor, TensorRef
from ..numbers import read_number
from ..torch_files import TorchTensor, write_option

__all__ = ["STEP", "CommonSteps", "step_of"]

STEP = "step"
# Which of the two betas a moment decays with; an optimizer with the first two of them corrects for it.
_BETA_OF_MOMENT = {"exp_avg": 0, "exp_avg_sq": 1, "max_exp_avg_sq": 1}
_ADAM = frozenset({"exp_avg", "exp_avg_sq"})


def step_of(state: StateRef) -> float | None:
    """How many updates a parameter got; None if its optimizer does not count."""
    step = state.tensors.get(STEP)
    return None if step is None or step.meta.numel != 1 else float(read_number(step))


class CommonSteps:
    """Brings the states of parameters to common counts, and remembers what it did.

    Args:
        path: The checkpoint that is planned from, for errors.
        own_steps: Refuse instead.
    """

    def __init__(self, path: Path, *, own_steps: bool) -> None:
        self._path = path
        self._own_steps = own_steps
        self._changed: Counter[tuple[float, float, bool]] = Counter()

    def adjust(
        self, fqn: str, state: StateRef, common: float | None, options: Mapping[str, object]
    ) -> Mapping[str, TensorRef]:
        """The tensors of a parameter's state as they are at the common count.

        Args:
            fqn: The parameter.
            state: As it was saved.
            common: The count; None if there is none.
            options: Of its group.

        Raises:
            IncompatibleError: The counts differ, and are to be kept, or the group does not say its betas.
        """
        own = step_of(state)
        if own is None or common is None or own == common:
            return state.tensors
        if self._own_steps:
            raise self._refuse(fqn, own, common, "kept", "leave out --own-steps to have its moments rescaled")
        corrects = state.tensors.keys() >= _ADAM and options.get("bias_correction") is not False
        self._changed[own, common, corrects] += 1
        if not corrects or own <= 0 or common <= 0:
            return state.tensors
        betas = _read_betas(options)
        if betas is None:
            raise self._refuse(fqn, own, common, "converted without the betas", "take layers of one step only")
        return {
            leaf: _rescale(ref, betas[_BETA_OF_MOMENT[leaf]], own, common) if leaf in _BETA_OF_MOMENT else ref
            for leaf, ref in state.tensors.items()
        }

    def notes(self) -> list[str]:
        """What was done, in sentences."""
        return [
            f"{count} parameters saved after {own:g} updates go on with their group's {common:g}"
            + (", their moments rescaled to match" if corrects else "")
            for (own, common, corrects), count in sorted(self._changed.items())
        ]

    def _refuse(self, fqn: str, own: float, common: float, what: str, hint: str) -> IncompatibleError:
        return IncompatibleError(
            f"DeepSpeed has one step count for all parameters of a group, so that of a parameter cannot be {what}",
            kind="common-step",
            path=self._path,
            fqn=fqn,
            expected=f"step {common:g}",
            found=f"step {own:g}",
            hint=hint,
        )


def _rescale(ref: TensorRef, beta: float, own: float, common: float) -> TensorRef:
    factor = (1 - beta**common) / (1 - beta**own)
    return ref if factor == 1 else ScaledTensor(source=ref, factor=factor)


def _read_betas(options: Mapping[str, object]) -> tuple[float, float] | None:
    found = write_option(options.get("betas"))
    if not isinstance(found, tuple | list) or len(found) != 2:
        return None
    betas = [read_number(each.ref) if isinstance(each, TorchTensor) else each for each in found]
    if not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
        return None
    return float(betas[0]), float(betas[1])
