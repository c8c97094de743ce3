"""Real text that every Python brings along, as tokens: its English, and its source code.

Prose is the topics of ``help()`` and the docstrings of one half of the standard library, code is the other half. A
tenth of the documents of each is held out for validation, so no document is in two parts. Tokens are those of a
byte-level BPE trained on what is not held out.
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
_SHARES = {"training": 1, "validation": 8}
_LIBRARY = Path(sysconfig.get_path("stdlib"))


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
    """``prose-training`` and so on -> text, of ``chars`` characters at most; for validation an eighth of that."""
    left = {f"{kind}-{use}": chars // share for kind in ("prose", "code") for use, share in _SHARES.items()}
    parts: dict[str, list[str]] = {part: [] for part in left}
    for key in sorted(_list_documents(), key=lambda key: _hash(str(key))):
        kind = "code" if isinstance(key, Path) and _hash(str(key)) % 2 else "prose"
        part = f"{kind}-{'validation' if _hash(str(key)) // 2 % 10 == 0 else 'training'}"
        if left[part] > 0:
            text = topics[key] if isinstance(key, str) else _read_source(key, kind)
            parts[part].append(text[: left[part]])
            left[part] -= len(text)
    return {name: "\n\n".join(texts) for name, texts in parts.items()}


def _list_documents() -> Iterator[str | Path]:
    """Names of topics, and paths in the standard library, relative to it."""
    yield from topics
    for path in _LIBRARY.rglob("*.py"):
        relative = path.relative_to(_LIBRARY)
        if not _SKIPPED.intersection(relative.parts) and not path.name.startswith("_sysconfigdata"):
            yield relative


def _read_source(path: Path, kind: str) -> str:
    source = (_LIBRARY / path).read_text(encoding="utf-8", errors="replace")
    return source if kind == "code" else "\n\n".join(_read_docstrings(source))


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
