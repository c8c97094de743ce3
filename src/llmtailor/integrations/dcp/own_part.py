"""A rank's vote on a save, which DCP itself carries to rank 0."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from ...manifest import Manifest
from ...votes import Vote, digest_schema

__all__ = ["make_vote"]


def make_vote(rank: int, directory: Path, own: Manifest, choice: str) -> Vote:
    """A rank's vote for a save, all of whose files are written."""
    return Vote(
        rank=rank,
        step=own.step,
        host=socket.gethostname(),
        pid=os.getpid(),
        store=str(directory.resolve()),
        choice=choice,
        schema_digest=digest_schema(own),
        parent=None if own.parent is None else own.parent.digest,
        layers=tuple(layer for layer in own.layers if layer.files),
        files=own.files,
    )
