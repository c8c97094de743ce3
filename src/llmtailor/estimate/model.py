"""A model's tensors by name, from its configuration or from a checkpoint; reads no weights and imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..catalog import Catalog
from ..errors import NotFoundError, UnsupportedError
from ..formats import detect_format, open_catalog
from ..formats.hf.asking import ask_transformers
from ..formats.hf.config import ModelConfig, parse_config
from ..formats.hf.json_files import read_text
from ..hub import locate_source
from ..layers import LayerMap, canonical_name, map_names
from ..tensors import TensorMeta

__all__ = ["ModelTensors", "read_model_tensors"]

_CONFIG_NAME = "config.json"
# Masters stand among the state in a file of ours. Source: zero/reading.py (MASTER).
_MASTER = "master"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTensors:
    """What there is to save of a model, as far as it is known without training it."""

    name: str
    """As the user gave it."""
    origin: str
    """Where the names and shapes are from, for people."""
    layers: LayerMap
    tensors: Mapping[str, TensorMeta]
    """Parameters and buffers, tied ones once, in model order. Of a configuration parameters alone, as F32."""
    buffers: frozenset[str]
    """Those of ``tensors`` that are known to be buffers."""
    state: Mapping[str, Mapping[str, TensorMeta]] | None
    """fqn -> leaf -> what the optimizer keeps, masters included; None where that is not known."""

    @property
    def num_parameters(self) -> int:
        return sum(meta.numel for fqn, meta in self.tensors.items() if fqn not in self.buffers)


def read_model_tensors(name: str, *, on_build: Callable[[str], None] = lambda what: None) -> ModelTensors:
    """Read what a name stands for.

    Args:
        name: A ``config.json``; a directory with one, or with a checkpoint of any format, whose weights say more than
            its configuration; ``org/model`` of the local hub cache.
        on_build: Called before a model is built, which takes seconds, with what it is.

    Raises:
        NotFoundError: There is nothing of that name.
        UnsupportedError: transformers is not installed, or cannot build the model; or it had to be downloaded.
        FormatError, IncompleteError: What is there is damaged, or of no known format.
    """
    path = _locate(name)
    if path.is_dir():
        names = set(os.listdir(path))
        if _CONFIG_NAME not in names or _has_weights(path):
            return _read_checkpoint(name, path)
        path = path / _CONFIG_NAME
    if not path.is_file():
        raise NotFoundError(
            "there is no such configuration or checkpoint",
            kind="missing-model",
            path=name,
            expected="a config.json, a directory with one, a checkpoint, or a model of the local hub cache",
            found="nothing",
            hint="check the path; relative ones start at the current directory",
        )
    return _read_config(name, path, on_build)


def _locate(name: str) -> Path:
    path = Path(name)
    if not path.exists() and "@" in name:
        raise UnsupportedError(
            "a model is not downloaded for an estimate, which needs its config.json alone",
            kind="estimate-download",
            path=name,
            expected="a config.json, or org/model of the local hub cache",
            hint="hf download ORG/MODEL config.json, then estimate ORG/MODEL",
        )
    return locate_source(name)


def _has_weights(path: Path) -> bool:
    try:
        detect_format(path)
    except NotFoundError:
        raise
    except ValueError:  # FormatError: it is none of them
        return False
    return True


def _read_checkpoint(name: str, path: Path) -> ModelTensors:
    # The optimizer of the HF Trainer has no names, and to find them may take a process of its own.
    catalog = open_catalog(path, with_optimizer=detect_format(path) != "hf")
    return ModelTensors(
        name=name,
        origin=f"a checkpoint of format {catalog.format}",
        layers=catalog.layers,
        tensors={fqn: ref.meta for fqn, ref in catalog.weights.items()},
        buffers=catalog.buffers,
        state=_stored_state(catalog) if catalog.has_optimizer else None,
    )


def _stored_state(catalog: Catalog) -> dict[str, dict[str, TensorMeta]]:
    state = {fqn: {leaf: ref.meta for leaf, ref in each.tensors.items()} for fqn, each in catalog.states.items()}
    for fqn, master in catalog.masters.items():
        state.setdefault(fqn, {})[_MASTER] = master.meta
    return state


def _read_config(name: str, path: Path, on_build: Callable[[str], None]) -> ModelTensors:
    config = parse_config(read_text(path), path)
    if config.model_type is None:
        raise _cannot_build(config, "no model_type in it", "model_type, as transformers writes it")
    on_build(f"a {config.model_type} model")
    answer = ask_transformers(config.text)
    if answer.get("kind") == "no-transformers":
        raise UnsupportedError(
            "a model is built from its configuration by transformers, which is not installed",
            kind="missing-extra",
            path=path,
            hint="pip install 'llmtailor[hf]', or estimate from a checkpoint",
        )
    if "error" in answer:
        raise _cannot_build(config, str(answer["error"])[:500], "a model that this transformers can build")
    tensors = {canonical_name(fqn): TensorMeta(dtype="F32", shape=tuple(shape)) for fqn, shape in answer["parameters"]}
    ties = {canonical_name(further): canonical_name(first) for further, first in answer["ties"].items()}
    cut = map_names({fqn: meta.shape for fqn, meta in tensors.items()})
    return ModelTensors(
        name=name,
        origin=f"a configuration, built by transformers {answer['version']}",
        layers=LayerMap(cut.layers, ties),
        tensors=tensors,
        buffers=frozenset(),
        state=None,
    )


def _cannot_build(config: ModelConfig, found: str, expected: str) -> UnsupportedError:
    return UnsupportedError(
        "no model can be built from this configuration",
        kind="cannot-build",
        path=config.path,
        expected=expected,
        found=found,
        hint="models with code of their own are not run; estimate from a checkpoint of it instead",
    )
