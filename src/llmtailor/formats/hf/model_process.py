"""Ask transformers for a model's parameters, in a process of its own.

Run as ``python -P -m llmtailor.formats.hf.model_process``: ``config.json`` comes in on stdin, one JSON object goes out
on stdout. The model is built on the meta device: no weights, no network, no code but that of the installed
transformers. Whatever goes wrong is said in the answer; only the parent judges it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

__all__ = ["describe_model", "main"]

# Of data: torch and transformers take less than one, and the modules of a large model a few hundred MiB.
_MAX_NBYTES = 8 * 2**30

# What could make building a model fetch something, run foreign code or change its parameters.
# Source: transformers 5.23, modeling_utils.py (from_config, _from_config), quantizers/auto.py.
_LEFT_OUT = frozenset({
    "_attn_implementation", "_attn_implementation_internal", "_experts_implementation", "attn_implementation",
    "auto_map", "experts_implementation", "quantization_config",
})  # fmt: skip


def main() -> int:
    """Answer one question."""
    _limit_memory()
    question = sys.stdin.buffer.read()
    answer = sys.stdout
    # A library's greetings must not stand in the answer.
    with contextlib.redirect_stdout(sys.stderr):
        found = _answer(question)
    json.dump(found, answer)
    return 0


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on every platform, and the time limit stands without it
        return
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = _MAX_NBYTES if hard == resource.RLIM_INFINITY else min(_MAX_NBYTES, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _answer(question: bytes) -> dict[str, Any]:
    try:
        import transformers
    except ImportError as err:
        return {"error": str(err), "kind": "no-transformers"}
    try:
        return {"version": transformers.__version__, **describe_model(json.loads(question))}
    except Exception as err:
        # Anything: a configuration of some other version fails in its model's own way.
        return {"error": f"{type(err).__name__}: {err}", "kind": "cannot-build"}


def describe_model(config: dict[str, Any]) -> dict[str, Any]:
    """Parameters of the model that a configuration describes.

    Returns:
        ``parameters``: [name, shape] in the order of ``named_parameters()``; ``layer_norms``: names of those that
        belong to a ``torch.nn.LayerNorm``; ``ties``: further name -> first name.
    """
    import torch
    import transformers

    # Untyped where transformers says nothing of its types.
    library: Any = transformers
    config = _clean(config)
    known = library.AutoConfig.for_model(config.pop("model_type"), **config)
    names = config.get("architectures") or [None]
    named: Any = getattr(library, str(names[0]), None)
    with torch.device("meta"):
        if isinstance(named, type) and issubclass(named, library.PreTrainedModel):
            make: Any = named
            model = make._from_config(known, attn_implementation="eager")
        else:
            model = library.AutoModelForCausalLM.from_config(known, attn_implementation="eager")
        model.tie_weights()
    firsts = {id(parameter): name for name, parameter in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    norms = [name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)]
    return {
        "parameters": [[name, list(parameter.shape)] for name, parameter in model.named_parameters()],
        "layer_norms": [name for name in firsts.values() if name.rpartition(".")[0] in set(norms)],
        "ties": {name: firsts[id(each)] for name, each in every.items() if firsts[id(each)] != name},
    }


def _clean(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _clean(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _LEFT_OUT
    }


if __name__ == "__main__":
    raise SystemExit(main())
