"""Where checkpoints live: the local directory, its lock, and the publish protocol."""

from .direct_file import ALIGNMENT, DirectFile, pad
from .file_reading import PIECE_NBYTES, FileReader, aligned_buffer, read_buffered, read_cached, read_direct, read_files
from .filesystem import FreeSpace, LocalFileSystem
from .line_file import append_line, read_lines
from .lock import RunLock
from .output_directory import OutputDirectory
from .pins import PINS_NAME, add_pin, read_pins, remove_pin
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
from .shared_staging import SharedCheckpoint, StagingSeat
from .staging import StagedCheckpoint, StagedFile

__all__ = [
    "ALIGNMENT",
    "PIECE_NBYTES",
    "PINS_NAME",
    "STAGING_NAME",
    "CheckpointEntry",
    "DirectFile",
    "FileReader",
    "FreeSpace",
    "LocalFileSystem",
    "OutputDirectory",
    "RunDirectory",
    "RunLock",
    "SetAsideEntry",
    "SharedCheckpoint",
    "StagedCheckpoint",
    "StagedFile",
    "StagingSeat",
    "add_pin",
    "aligned_buffer",
    "append_line",
    "checkpoint_name",
    "list_attempts",
    "list_checkpoints",
    "list_set_aside",
    "newest_step_seen",
    "pad",
    "read_buffered",
    "read_cached",
    "read_direct",
    "read_files",
    "read_lines",
    "read_pins",
    "remove_pin",
]
