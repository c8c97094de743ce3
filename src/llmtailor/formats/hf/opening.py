"""A Hugging Face directory as a catalog."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...catalog import Catalog, OptimizerRef, StateRef
from ...errors import FormatError, NotFoundError
from ...layers import canonical_name
from ..small_files import list_small_files
from ..source_files import resolve_source
from .asking import find_order
from .config import ModelConfig, find_ties, parse_config
from .json_files import read_json_object, read_text
from .optimizer import read_optimizer
from .parameter_order import FAMILIES, check_blocks
from .small_names import is_carried
from .tied_head import join_tied_head
from .weights import read_weights

__all__ = ["open_hf"]

# What only other formats have. Source: this package's specification (tailor.json); DeepSpeed 0.19.8, runtime/engine.py
# (latest, global_step*); accelerate 1.15, utils/fsdp_utils.py (pytorch_model_fsdp*);
# torch 2.13, distributed/checkpoint/filesystem.py (.metadata).
_OTHERS = {
    "tailor.json": "a checkpoint of LLMTailor",
    "global_step*/*_optim_states.pt": "a DeepSpeed checkpoint",
    "global_step*/*_model_states.pt": "a DeepSpeed checkpoint",
    "*_optim_states.pt": "a DeepSpeed checkpoint",
    "pytorch_model_fsdp*": "an FSDP checkpoint",
    ".metadata": "a checkpoint of torch.distributed.checkpoint",
}
# Source: accelerate 1.15, checkpointing.py (save_accelerator_state), utils/constants.py (OPTIMIZER_NAME).
_ACCELERATE_OPTIMIZER = "optimizer.bin"


def open_hf(
    path: Path,
    *,
    parameter_names: Sequence[str] | None = None,
    with_optimizer: bool = True,
    allow_partial: bool = False,
) -> Catalog:
    """Open a checkpoint of the Hugging Face Trainer (one process or DDP), or a bare model directory.

    Nothing but headers, pickles (inertly) and JSON is read, and a head that may be its embedding. A model whose family
    is not known here is built on the meta device by transformers in a child process, where its optimizer is to be read.

    Args:
        path: The directory.
        parameter_names: Names for the positions of ``optimizer.pt``, where they cannot be told otherwise: the
            parameters as the optimizer has them, group after group; or as ``model.named_parameters()`` has them,
            frozen ones included or not. Both readings are tried against the shapes.
        with_optimizer: Whether ``optimizer.pt`` is read; for weights alone it need not be understood, and may be of
            Accelerate.
        allow_partial: Let whole layers of a model of a known family be missing, as in a selective save.

    Returns:
        The catalog; without optimizer where there is no ``optimizer.pt``, and without step where there is no
        ``trainer_state.json``. ``native`` is the ``ModelConfig``: the number of blocks and the tying it says.

    Raises:
        NotFoundError: There is no such directory, or there are no weights in it.
        FormatError: A checkpoint of another format (kind ``other-format``), or a file is not what it claims to be.
        IncompleteError: A shard, a tensor or a layer is missing.
        IncompatibleError: Which state belongs to which parameter cannot be told (``ambiguous-names``,
            ``unknown-order``), or weights, configuration and optimizer do not fit together.
        UnsupportedError: An adapter without its model, converted weights, or state that is not plain.

    Source:
        transformers 5.23.0, trainer.py (_save_checkpoint, _save_optimizer_and_scheduler).
    """
    if not path.is_dir():
        raise NotFoundError("there is no such directory", kind="missing-checkpoint", path=path)
    _refuse_others(path)
    if with_optimizer:
        _refuse_accelerate(path)
    held = read_weights(path)
    config = _read_config(path)
    family = FAMILIES.get(config.model_type) if config is not None and config.model_type is not None else None
    by_default = None if family is None else family.is_tied
    weights = join_tied_head(held, config, is_tied_by_default=by_default)
    ties = {**weights.ties, **find_ties(config, weights.tensors, is_tied_by_default=by_default)}
    check_blocks(config, {*weights.tensors, *ties}, path, allow_partial=allow_partial)
    shapes = {fqn: tensor.meta.shape for fqn, tensor in weights.tensors.items()}
    states: dict[str, StateRef] = {}
    optimizers: tuple[OptimizerRef, ...] = ()
    optimizer_path = path / "optimizer.pt"
    if with_optimizer and (optimizer_path.is_symlink() or optimizer_path.exists()):
        optimizer = read_optimizer(
            resolve_source(optimizer_path, path),
            shapes,
            find_order=lambda: find_order(config, shapes),
            given=None if parameter_names is None else _canonical_names(parameter_names, ties),
        )
        states, optimizers = dict(optimizer.states), (optimizer.ref,)
    return Catalog(
        path=path,
        format="hf",
        step=_read_step(path),
        weights=weights.tensors,
        ties=ties,
        states=states,
        optimizers=optimizers,
        files=list_small_files(path, is_carried),
        native=config,
    )


def _refuse_others(path: Path) -> None:
    for pattern, kind in _OTHERS.items():
        if any(path.glob(pattern)):
            raise FormatError(
                "not a checkpoint of the Hugging Face Trainer in one process",
                kind="other-format",
                path=path,
                expected="model.safetensors and optimizer.pt, or a bare model directory",
                found=f"{kind}: there is {pattern}",
            )


def _refuse_accelerate(path: Path) -> None:
    if (path / _ACCELERATE_OPTIMIZER).exists():
        raise FormatError(
            "the optimizer is not one of the Hugging Face Trainer",
            kind="other-format",
            path=path,
            expected="optimizer.pt, or a bare model directory",
            found=f"what Accelerate's save_state writes: there is {_ACCELERATE_OPTIMIZER}",
            hint="take the weights alone (--weights-only), or save the training in a format that llmtailor reads",
        )


def _canonical_names(names: Sequence[str], ties: dict[str, str]) -> list[str]:
    canonical = [canonical_name(name) for name in names]
    return [ties.get(name, name) for name in canonical]


def _read_config(root: Path) -> ModelConfig | None:
    path = root / "config.json"
    if not (path.is_symlink() or path.exists()):
        return None
    real = resolve_source(path, root)
    return parse_config(read_text(real), path)


def _read_step(root: Path) -> int | None:
    path = root / "trainer_state.json"
    if not (path.is_symlink() or path.exists()):
        return None
    step = read_json_object(resolve_source(path, root), what="trainer_state.json").get("global_step")
    if type(step) is not int or not 0 <= step < 2**63:
        raise FormatError(
            "trainer_state.json does not say the step",
            kind="bad-trainer-state",
            path=path,
            expected="global_step: a number of steps",
            found=repr(step)[:200],
        )
    return step
