"""How LLMTailor counts the layers of a model: 0 is the final norm, 1 to L the blocks, then the head and the embedding.

    untied    0 norm    1..L blocks    L+1 lm_head         L+2 embed_tokens
    tied      0 norm    1..L blocks    L+1 embed_tokens

So its optimizer's parameter groups are numbered, its zero-length ranges and StreamCheck's flags.

Source: LLMTailor 0db721c, examples/trainLLM.py (parameter groups), create_yaml.py (units).
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from ..layers import Layer, LayerKind

__all__ = ["Role", "find_role", "role_of_unit"]


class Role(StrEnum):
    """An auxiliary layer by what it does."""

    NORM = "norm"
    HEAD = "head"
    EMBEDDING = "embedding"


def role_of_unit(unit: int, num_blocks: int, *, is_tied: bool) -> Role | None:
    """What a unit stands for; None for a block, and for one that there is not."""
    if unit == 0:
        return Role.NORM
    last = (Role.EMBEDDING,) if is_tied else (Role.HEAD, Role.EMBEDDING)
    return last[unit - num_blocks - 1] if 0 <= unit - num_blocks - 1 < len(last) else None


def find_role(role: Role, layers: Iterable[Layer]) -> Layer | None:
    """The one auxiliary layer that has a role; None if there is none, or more than one."""
    found = [layer for layer in layers if _has(layer, role)]
    return found[0] if len(found) == 1 else None


def _has(layer: Layer, role: Role) -> bool:
    if role is Role.NORM:
        last = layer.name.rpartition(".")[2].lower()
        return layer.kind is LayerKind.OTHER and ("norm" in last or last.startswith("ln"))
    return layer.kind is (LayerKind.HEAD if role is Role.HEAD else LayerKind.EMBEDDING)
