"""In which order a model has its parameters: what an optimizer's positions count.

A weights file does not say it (safetensors sorts by name). For families of models that differ in numbers alone the
order is written down here; ``model_process`` asks transformers for any other. And the Trainer's rule by which
parameters are spared weight decay, which makes its two groups.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import FormatError, IncompleteError
from .config import ModelConfig

__all__ = ["FAMILIES", "Family", "ParameterOrder", "check_blocks", "is_spared_decay", "known_order"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterOrder:
    """The parameters of a model in the order of ``named_parameters()``, tied ones by their first name only."""

    names: tuple[str, ...]
    undecayed: frozenset[str]
    """Those that the Trainer gives no weight decay."""
    origin: str
    """Who says so, for messages."""

    @property
    def groups(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The Trainer's two groups: with weight decay, without.

        Source: transformers 5.23, trainer.py (create_optimizer).
        """
        decayed = tuple(name for name in self.names if name not in self.undecayed)
        return decayed, tuple(name for name in self.names if name in self.undecayed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Modules with parameters, in the order in which the model registers them; each has a weight, then maybe a bias."""

    block: tuple[str, ...]
    """Of ``model.layers.<i>``."""
    head: tuple[str, ...] = ("model.embed_tokens",)
    """Before the blocks."""
    tail: tuple[str, ...] = ("model.norm", "lm_head")
    """After the blocks."""
    is_tied: bool = False
    """``tie_word_embeddings`` where the configuration does not say."""


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_NORMED_ATTENTION = (*_ATTENTION, "self_attn.q_norm", "self_attn.k_norm")
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")

_LLAMA = Family(block=(*_ATTENTION, *_GATED, *_NORMS))
_TIED_LLAMA = Family(block=_LLAMA.block, is_tied=True)
_OLMO2 = Family(block=(*_NORMED_ATTENTION, *_GATED, "post_attention_layernorm", "post_feedforward_layernorm"))
_COHERE = Family(block=(*_ATTENTION, *_GATED, "input_layernorm"), is_tied=True)

# model_type -> family. Source: transformers 5.23.0, models/<model_type>/modeling_<model_type>.py; a test builds each.
FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(
        ("cwm", "granite", "helium", "llama", "ministral3", "mistral", "qwen2", "seed_oss", "stablelm"), _LLAMA
    ),
    **dict.fromkeys(("ernie4_5", "gemma", "smollm3"), _TIED_LLAMA),
    **dict.fromkeys(("cohere", "cohere2"), _COHERE),
    **dict.fromkeys(("exaone4", "olmo2", "olmo3"), _OLMO2),
    "arcee": Family(block=(*_ATTENTION, "mlp.up_proj", "mlp.down_proj", *_NORMS)),
    "gemma2": Family(block=(*_ATTENTION, *_GATED, *_FOUR_NORMS), is_tied=True),
    "gemma3_text": Family(block=(*_NORMED_ATTENTION, *_GATED, *_FOUR_NORMS), is_tied=True),
    "glm": Family(block=(*_ATTENTION, "mlp.gate_up_proj", "mlp.down_proj", *_NORMS)),
    "glm4": Family(
        block=(
            *_ATTENTION,
            "mlp.gate_up_proj",
            "mlp.down_proj",
            *_NORMS,
            "post_self_attn_layernorm",
            "post_mlp_layernorm",
        )
    ),
    "olmo": Family(block=(*_ATTENTION, *_GATED), tail=("lm_head",)),
    "phi": Family(
        block=(*_ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2", "input_layernorm"),
        tail=("model.final_layernorm", "lm_head"),
    ),
    "phi3": Family(block=("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj", *_NORMS)),
    "qwen3": Family(block=(*_NORMED_ATTENTION, *_GATED, *_NORMS)),
    "starcoder2": Family(block=(*_ATTENTION, "mlp.c_fc", "mlp.c_proj", *_NORMS), is_tied=True),
}

_BLOCK = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,8})\.(.+)")
_LEAVES = {"weight": 0, "bias": 1}

# Source: transformers 5.23, trainer.py (get_decay_parameter_names) and trainer_pt_utils.py (get_parameter_names);
# it searches the lower-cased end of a name at every dot, which is to search the whole name.
_SPARED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def is_spared_decay(name: str) -> bool:
    """Whether the Trainer gives a parameter no weight decay because of its name.

    Parameters of a ``torch.nn.LayerNorm`` are spared under any name; that needs the model to be known.
    """
    return _SPARED.search(name.lower()) is not None


def known_order(config: ModelConfig | None, names: Collection[str]) -> ParameterOrder | None:
    """The order of a model of a known family, from its configuration and the names in its weights file.

    Args:
        config: Its ``config.json``.
        names: Its tensors, in any order; a tied head is not among them.

    Returns:
        None where the family is not known, or the model has a tensor that the family has not.
    """
    family = FAMILIES.get(config.model_type) if config is not None and config.model_type is not None else None
    if config is None or family is None:
        return None
    ranks = {name: _rank(name, family) for name in names}
    placed = {name: rank for name, rank in ranks.items() if rank is not None}
    if len(placed) < len(ranks):
        return None
    is_tied = family.is_tied if config.is_tied is None else config.is_tied
    # Old files hold a tied head beside the embedding; the model has one parameter all the same.
    ordered = sorted((name for name in placed if not (is_tied and name == "lm_head.weight")), key=placed.__getitem__)
    return ParameterOrder(
        names=tuple(ordered),
        undecayed=frozenset(filter(is_spared_decay, ordered)),
        origin=f"the order of {config.model_type} models",
    )


def _rank(name: str, family: Family) -> tuple[int, int, int, int] | None:
    module, _, leaf = name.rpartition(".")
    if leaf not in _LEAVES:
        return None
    block = _BLOCK.fullmatch(module)
    if block is not None:
        inner = block[2]
        return (1, int(block[1]), family.block.index(inner), _LEAVES[leaf]) if inner in family.block else None
    for part, modules in ((0, family.head), (2, family.tail)):
        if module in modules:
            return part, 0, modules.index(module), _LEAVES[leaf]
    return None


def check_blocks(
    config: ModelConfig | None, names: Collection[str], path: Path, *, allow_partial: bool = False
) -> None:
    """Check that a model of a known family has all its modules, before anything is taken from it.

    Stock loading only warns of a missing layer, and trains a new one.

    Args:
        config: Its ``config.json``.
        names: Its tensors and the further names of tied ones.
        path: For the error.
        allow_partial: Let whole layers be missing (a selective save), but no part of one.

    Raises:
        IncompleteError: A block, or a module of one, is missing.
        FormatError: There are more blocks than the configuration says.
    """
    family = FAMILIES.get(config.model_type) if config is not None and config.model_type is not None else None
    # A model of the family in another form (quantized, a classifier) has other names: nothing is known of it.
    if config is None or family is None or config.num_blocks is None or not names:
        return
    if not all(_rank(name, family) for name in names):
        return
    found = {int(block[1]) for name in names if (block := _BLOCK.fullmatch(name))}
    blocks = found if allow_partial else range(config.num_blocks)
    modules = [] if allow_partial else [*family.head, *family.tail]
    modules += [f"model.layers.{index}.{inner}" for index in sorted(blocks) for inner in family.block]
    missing = [f"{module}.weight" for module in modules if f"{module}.weight" not in names]
    if missing:
        raise IncompleteError(
            f"{len(missing)} tensors of the model are missing",
            kind="missing-layer",
            path=path,
            fqn=missing[0],
            expected=f"a {config.model_type} model of {config.num_blocks} blocks, as config.json says",
            found="no " + ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else ""),
            hint="the checkpoint was not written to its end, or is a partial one, or config.json is of another model",
        )
    if found and max(found) >= config.num_blocks:
        raise FormatError(
            "the weights have more blocks than config.json says",
            kind="config-mismatch",
            path=path,
            expected=f"{config.num_blocks} blocks",
            found=f"block {max(found)}",
            hint="config.json is of another model; copy both from the source again",
        )
