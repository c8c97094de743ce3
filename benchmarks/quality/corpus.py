"""Real text that every Python brings along, as tokens: its English, and its source code.

Prose is the topics of ``help()`` and the docstrings of one half of the standard library, code is the other half. A tenth
of the documents of each is held out for validation, so no document is in two parts. Tokens are those of a byte-level
BPE trained on what is not held out.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

Tokens = np.ndarray

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
_SHORTEST_DOCSTRING = 80


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token ids by part: ``prose``, ``code``, each for training and for validation."""

    training: dict[str, Tokens]
    validation: dict[str, Tokens]
    digest: str


def load_corpus(cache: Path, *, vocabulary: int, chars: int) -> Corpus:
    """From the cache, or made from the texts of this Python and kept there."""
    texts = read_texts(chars)
    digest = hashlib.sha256(f"{vocabulary}".encode())
    for name in sorted(texts):
        digest.update(name.encode() + b"\0" + texts[name].encode())
    path = cache / f"tokens-{digest.hexdigest()[:16]}.npz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, **encode_texts(texts, vocabulary))
        partial.replace(path)
    with np.load(path) as kept:
        arrays = {name: kept[name] for name in kept.files}
    of_tokens = hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()[:16]
    return Corpus(
        training={name: arrays[f"{name}-training"] for name in ("prose", "code")},
        validation={name: arrays[f"{name}-validation"] for name in ("prose", "code")},
        digest=of_tokens,
    )


def read_texts(chars: int) -> dict[str, str]:
    """``prose-training`` and so on -> text, at most so many characters of prose and of code."""
    parts: dict[str, list[str]] = {f"{kind}-{use}": [] for kind in ("prose", "code") for use in ("training", "validation")}
    left = {"prose": chars, "code": chars}
    for kind, key, text in sorted(_read_documents(), key=lambda document: _hash(document[1])):
        if left[kind] > 0:
            use = "validation" if _hash(key) // 2 % 10 == 0 else "training"
            parts[f"{kind}-{use}"].append(text)
            left[kind] -= len(text)
    return {name: "\n\n".join(texts) for name, texts in parts.items()}


def _read_documents() -> Iterator[tuple[str, str, str]]:
    """Kind, name and text of each."""
    for name, text in topics.items():
        yield "prose", f"topic {name}", text
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if _SKIPPED.intersection(relative.parts) or path.name.startswith("_sysconfigdata"):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        if _hash(str(relative)) % 2:
            yield "code", str(relative), source
        else:
            yield "prose", str(relative), "\n\n".join(_read_docstrings(source))


def _read_docstrings(source: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) >= _SHORTEST_DOCSTRING:
                yield text


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def encode_texts(texts: dict[str, str], vocabulary: int) -> dict[str, Tokens]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([texts["prose-training"], texts["code-training"]], trainer)
    return {name: np.asarray(tokenizer.encode(text).ids, dtype=np.uint16) for name, text in texts.items()}
