"""The order of any model's parameters: from the families known here, else from transformers in a child process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from ...errors import FormatError, IncompatibleError, UnsupportedError
from .config import ModelConfig
from .parameter_order import ParameterOrder, is_spared_decay, known_order

__all__ = ["ask_transformers", "find_order"]

_MODULE = "llmtailor.formats.hf.model_process"
# The first import of torch and transformers from a cold network disk takes a minute.
_TIMEOUT_SECONDS = 300
_NAMES_HINT = "list the parameters, one name per line, in a file and give it with --parameter-names FILE"


def find_order(config: ModelConfig | None, shapes: Mapping[str, tuple[int, ...]]) -> ParameterOrder:
    """The order of a model's parameters.

    Args:
        config: Its ``config.json``; None where there is none.
        shapes: Its tensors by name, each once.

    Raises:
        IncompatibleError: Nobody knows the order (kind ``unknown-order``), or the configuration describes a model
            with other tensors.
        UnsupportedError: transformers keeps this model's weights under other names than its parameters.
    """
    order = known_order(config, shapes)
    if order is not None:
        return order
    if config is None or config.model_type is None:
        raise IncompatibleError(
            "it is not known in which order the model has its parameters",
            kind="unknown-order",
            path=None if config is None else config.path,
            expected="a config.json that says model_type",
            found="no config.json" if config is None else "no model_type",
            hint=_NAMES_HINT,
        )
    if config.num_blocks is not None and config.num_blocks > len(shapes):
        # Not left to the child: building a million blocks takes hours.
        raise FormatError(
            "config.json is of another model than the weights",
            kind="config-mismatch",
            path=config.path,
            expected=f"at most {len(shapes)} blocks, as there are {len(shapes)} tensors",
            found=f"{config.num_blocks} blocks",
        )
    answer = ask_transformers(config.text)
    if "error" in answer:
        raise _cannot_ask(config, answer)
    return _check_answer(config, answer, shapes)


@lru_cache(maxsize=64)
def ask_transformers(text: bytes) -> dict[str, Any]:
    """What ``model_process`` answers to a ``config.json``, or ``{"error": ..., "kind": ...}``; asked once."""
    # Offline, whatever the user's environment says: a configuration must not make anybody fetch a thing.
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    try:
        # -P and "/": a directory that came with a checkpoint must not become a place to import from.
        finished = subprocess.run(
            [sys.executable, "-P", "-m", _MODULE],
            input=text,
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
            cwd="/",
            env=environment,
        )
        answer = json.loads(finished.stdout)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {_TIMEOUT_SECONDS} s", "kind": "timeout"}
    except (OSError, ValueError) as err:
        return {"error": f"the process failed: {err}", "kind": "cannot-build"}
    return answer if isinstance(answer, dict) else {"error": "no answer", "kind": "cannot-build"}


def _cannot_ask(config: ModelConfig, answer: Mapping[str, Any]) -> IncompatibleError:
    is_missing = answer.get("kind") == "no-transformers"
    return IncompatibleError(
        f"it is not known in which order a {config.model_type} model has its parameters",
        kind="unknown-order",
        path=config.path,
        expected="transformers, which builds the model to see" if is_missing else "a model that transformers can build",
        found=str(answer["error"])[:500],
        hint=("install llmtailor[hf], or " if is_missing else "") + _NAMES_HINT,
    )


def _check_answer(
    config: ModelConfig, answer: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> ParameterOrder:
    parameters = {name: tuple(shape) for name, shape in answer["parameters"]}
    absent = [name for name in parameters if name not in shapes]
    if absent:
        raise UnsupportedError(
            f"{len(absent)} parameters of the model are not in its weights files under their own names",
            kind="converted-weights",
            path=config.path,
            fqn=absent[0],
            expected="files with the names of the parameters",
            found=f"others, as transformers {answer['version']} converts the weights of {config.model_type} models",
            hint="take the weights alone (--weights-only; of diff: --only weights)",
        )
    for name, shape in parameters.items():
        if shapes[name] != shape:
            raise IncompatibleError(
                "config.json describes a model with other shapes than the weights have",
                kind="config-mismatch",
                path=config.path,
                fqn=name,
                expected=list(shape),
                found=list(shapes[name]),
                hint="config.json is of another model; copy both from the source again",
            )
    norms = set(answer["layer_norms"])
    return ParameterOrder(
        names=tuple(parameters),
        undecayed=frozenset(name for name in parameters if name in norms or is_spared_decay(name)),
        origin=f"the order of {config.model_type} models in transformers {answer['version']}",
    )
