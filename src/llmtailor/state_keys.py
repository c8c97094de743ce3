"""Names in an optimizer file: ``state.<fqn>.<leaf>``, and where its notes stand."""

from __future__ import annotations

from .errors import IncompatibleError

__all__ = ["NOTES_KEY", "split_state_key", "state_key"]

NOTES_KEY = "llmtailor.notes"
"""In the ``__metadata__`` of an optimizer file: JSON, by the same names, of what tensors cannot say."""


def state_key(fqn: str, leaf: str) -> str:
    """Name of a leaf in a file.

    Source:
        torch 2.13, distributed/checkpoint/state_dict.py (_flatten_optim_state_dict): ``state.<fqn>.<state name>``.
    """
    return f"state.{fqn}.{leaf}"


def split_state_key(key: str) -> tuple[str, str]:
    """(fqn, leaf) of a name in a file; inverse of ``state_key``, since there is no ``.`` in a leaf.

    Raises:
        IncompatibleError: Not such a name.
    """
    prefix, _, rest = key.partition(".")
    fqn, _, leaf = rest.rpartition(".")
    if prefix != "state" or not fqn or not leaf:
        raise IncompatibleError(
            "not a name of optimizer state", kind="state-key", fqn=key, expected="state.<fqn>.<state name>"
        )
    return fqn, leaf
