"""What a rank says of its part of a save: a manifest of its own files, and the vote, which DCP carries to rank 0."""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...checkpoint import Checkpoint
from ...manifest import FileRecord, Manifest, Parent, World, Writer
from ...save_plan import SavePlan
from ...storage import SharedCheckpoint
from ...votes import Fault, Vote, digest_schema
from ...writer import WrittenLayer
from .lineage import Assignment

__all__ = ["describe_save", "find_elsewhere", "make_vote"]

# A directory of a network file system may show a new file only after so long.
_VISIBLE_SECS = 10.0


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


def find_elsewhere(staged: SharedCheckpoint, votes: Mapping[int, Vote]) -> Fault | None:
    """A rank whose directory has our directory's name and is another: on another machine, or mounted over."""
    deadline = time.monotonic() + _VISIBLE_SECS
    while missing := staged.find_missing_votes(votes):
        if time.monotonic() > deadline:
            vote = votes[missing[0]]
            text = f"{vote.name} writes to {vote.store}, which is not the directory that rank 0 knows by that name"
            return Fault(kind="ranks-disagree", text=text)
        time.sleep(0.1)
    return None


def describe_save(
    plan: SavePlan,
    written: Mapping[str, WrittenLayer],
    small: Sequence[FileRecord],
    assignment: Assignment,
    parent: Checkpoint | None,
) -> Manifest:
    """The save as one rank knows it, which is no whole checkpoint: not checked."""
    sharding: Any = "none" if plan.layout is None else "sharded"
    return Manifest.model_construct(
        run_id=assignment.run_id,
        step=plan.step,
        save_index=assignment.save_index,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        parent=None if parent is None else Parent(step=parent.manifest.step, digest=parent.digest),
        contents=plan.contents,
        strategy=plan.strategy,
        world=World(size=assignment.num_ranks, sharding=sharding, layout=plan.layout),
        writer=Writer(
            llmtailor=__version__,
            torch=torch.__version__,
            python=platform.python_version(),
            host=socket.gethostname(),
            pid=os.getpid(),
        ),
        tensors=plan.tensors,
        optimizers=plan.optimizers,
        layers=plan.record_layers(written),
        files=tuple(sorted(small, key=lambda file: file.path)),
    )
