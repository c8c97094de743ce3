"""Where checkpoints live: the local directory, its lock, and the publish protocol."""

from .filesystem import FreeSpace, LocalFileSystem
from .lock import RunLock
from .output_directory import OutputDirectory
from .run_directory import (
    STAGING_NAME,
    CheckpointEntry,
    RunDirectory,
    SetAsideEntry,
    checkpoint_name,
    list_attempts,
    list_checkpoints,
    list_set_aside,
    newest_step_seen,
)
from .staging import StagedCheckpoint

__all__ = [
    "STAGING_NAME",
    "CheckpointEntry",
    "FreeSpace",
    "LocalFileSystem",
    "OutputDirectory",
    "RunDirectory",
    "RunLock",
    "SetAsideEntry",
    "StagedCheckpoint",
    "checkpoint_name",
    "list_attempts",
    "list_checkpoints",
    "list_set_aside",
    "newest_step_seen",
]
