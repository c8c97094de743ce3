"""English text that every Python has: the topics of ``help()``, about half a megabyte. Bytes are the tokens."""

from __future__ import annotations

from pydoc_data.topics import topics

__all__ = ["VOCABULARY_SIZE", "cut_sequences", "read_text", "split_text"]

VOCABULARY_SIZE = 256
_VALIDATION_FRACTION = 0.1


def read_text() -> bytes:
    """All topics in the order of their names."""
    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def split_text(text: bytes) -> tuple[bytes, bytes]:
    """The part to train on and the part to validate on, which is the end of the text."""
    cut = len(text) - int(len(text) * _VALIDATION_FRACTION)
    return text[:cut], text[cut:]


def cut_sequences(text: bytes, length: int, limit: int | None = None) -> list[bytes]:
    """Sequences of equal length, without overlap; if there are more than ``limit``, that many, evenly spread."""
    starts = range(0, len(text) - length + 1, length)
    if limit is not None and len(starts) > limit:
        starts = starts[:: len(starts) // limit][:limit]
    return [text[start : start + length] for start in starts]
