"""Carries out the plan of a new checkpoint: everything or nothing.

check -> claim a private directory -> link -> transfer -> fsync -> seal -> sources unchanged? -> publish
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import FormatError, IntegrityError
from ..file_plan import CheckpointPlan, FilePlan, FileRange, LinkPlan, WrittenFile
from ..storage import LocalFileSystem, OutputDirectory
from ..tensor_refs import (
    AveragedTensor,
    CastTensor,
    CodedTensor,
    FileTensor,
    InlineTensor,
    ScaledTensor,
    TensorRef,
    TensorSlice,
)
from ..tensors import DTYPE_BITS, ByteRange
from .arithmetic import check_arithmetic
from .sources import SourceFiles
from .transfer import CHUNK_NBYTES, Transfer

__all__ = ["execute", "read_paths"]

# More do not make a disk faster, and each holds 16 MB.
_NUM_THREADS = 4
_MAX_NAME_NBYTES = 1024


def execute(
    plan: CheckpointPlan,
    target: Path,
    *,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
    threads: int | None = None,
    chunk_nbytes: int = CHUNK_NBYTES,
    filesystem: LocalFileSystem | None = None,
) -> tuple[WrittenFile, ...]:
    """Write a new checkpoint and publish it.

    Sources are opened for reading only, each needed byte is read once (what codes lie beside at the ends of a chunk
    twice), and memory stays below some 100 MB. Whatever goes wrong leaves nothing behind; a kill leaves a hidden
    directory, which the next call for the same target removes.

    Args:
        plan: All files of the checkpoint. Those of a plan with a seal never change again and become read-only.
        target: Where it goes; must not exist.
        on_bytes: Told of bytes as they are done; they add up to ``plan.nbytes``. Called by one thread at a time.
        threads: How many work at once.
        chunk_nbytes: What one of them reads and writes at a time, a multiple of 4096; each holds twice as much.
        filesystem: What carries out the changes.

    Returns:
        What was written, links and the seal included, in the order of the plan.

    Raises:
        AlreadyExistsError: The target exists.
        NotFoundError: A source is gone.
        IntegrityError: A source is not what was planned with, or changed meanwhile.
        FormatError: A source is no regular file, or holds codes that make no sense, or a name leads out of the target.
        UnsupportedError: Arithmetic on integers was planned.
        WriteError: The disk, a permission or a limit.
    """
    filesystem = filesystem or LocalFileSystem()
    _check_names(_names_of(plan))
    with SourceFiles() as sources:
        _inspect(plan.files, sources)
        nbytes = sum(file.nbytes for file in plan.files)
        num_files = len(plan.files) + len(plan.links) + 1
        output = OutputDirectory(target, nbytes=nbytes, num_files=num_files, filesystem=filesystem)
        try:
            transfer = Transfer(
                output,
                sources,
                filesystem,
                num_threads=threads or _NUM_THREADS,
                chunk_nbytes=chunk_nbytes,
                mode=0o644 if plan.seal is None else 0o444,
            )
            written = _fill(plan, output, transfer, sources, on_bytes)
            sources.check_unchanged()
            output.publish()
        except BaseException:
            output.abandon()
            raise
    return written


def _fill(
    plan: CheckpointPlan,
    output: OutputDirectory,
    transfer: Transfer,
    sources: SourceFiles,
    on_bytes: Callable[[int], None],
) -> tuple[WrittenFile, ...]:
    """Write all files, the last one when the others are durable."""
    written: dict[str, WrittenFile] = {}
    copied: list[LinkPlan] = []
    for link in plan.links:
        if output.link(link.name, link.source, link.nbytes):
            written[link.name] = WrittenFile(name=link.name, nbytes=link.nbytes, digest=link.digest)
            on_bytes(link.nbytes)
        else:
            sources.inspect(link.source, link.nbytes)
            copied.append(link)
    files = [*plan.files, *map(_copy_of, copied)]
    written |= {file.name: file for file in transfer.run(files, on_bytes)}
    for link in copied:
        _check_digest(link, written[link.name])
    output.sync()
    names = _names_of(plan)
    if plan.seal is not None:
        last = plan.seal({name: written[name] for name in names})
        _check_names([*names, last.name])
        _inspect([last], sources)
        written |= {file.name: file for file in transfer.run([last], lambda nbytes: None)}
        names.append(last.name)
    return tuple(written[name] for name in names)


def _names_of(plan: CheckpointPlan) -> list[str]:
    return [*(file.name for file in plan.files), *(link.name for link in plan.links)]


def _copy_of(link: LinkPlan) -> FilePlan:
    part = FileRange(path=link.source, byte_range=ByteRange(start=0, end=link.nbytes))
    return FilePlan(name=link.name, parts=(part,))


def _check_digest(link: LinkPlan, written: WrittenFile) -> None:
    if written.digest != link.digest:
        raise IntegrityError(
            "a file that was to be taken over is not the file that was published",
            kind="digest-mismatch",
            path=link.source,
            expected=link.digest,
            found=written.digest,
            hint="llmtailor verify says what else is damaged; take the layer from another checkpoint",
        )


def _check_names(names: Sequence[str]) -> None:
    """See to it that every file has a name of its own, inside the target.

    Raises:
        FormatError: One has not; names of small files are the source's.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen or not _is_inside(name):
            raise FormatError(
                "a file of the new checkpoint cannot have this name",
                kind="file-name",
                expected="each name once; relative, without . and .. and empty parts, UTF-8",
                found=ascii(name),
                hint="the source was tampered with, or holds a file that does not belong there; remove it",
            )
        seen.add(name)


def _is_inside(name: str) -> bool:
    try:
        nbytes = len(name.encode())
    except UnicodeEncodeError:
        return False
    parts = name.split("/")
    return nbytes <= _MAX_NAME_NBYTES and "\0" not in name and not {"", ".", ".."} & set(parts)


def _inspect(files: Sequence[FilePlan], sources: SourceFiles) -> None:
    """See to it that all that will be read is there, and all that will be computed can be."""
    for path, nbytes in read_paths(files).items():
        sources.inspect(path, nbytes)


def read_paths(files: Sequence[FilePlan]) -> dict[Path, int]:
    """Which files are read for new ones, and how far.

    Raises:
        UnsupportedError: Arithmetic on integers was planned.
    """
    needed: dict[Path, int] = {}
    seen: set[int] = set()
    for part in (part for file in files for part in file.parts):
        if isinstance(part, FileRange):
            needed[part.path] = max(needed.get(part.path, 0), part.byte_range.end)
        elif isinstance(part, TensorSlice) and id(part.tensor) not in seen:
            # By id: a tensor cut into many slices is looked at once, and the plan keeps it alive meanwhile.
            seen.add(id(part.tensor))
            check_arithmetic(part.tensor)
            for path, end in _ends(part.tensor):
                needed[path] = max(needed.get(path, 0), end)
    return needed


def _ends(tensor: TensorRef) -> Iterator[tuple[Path, int]]:
    """How far each file is read for a tensor."""
    match tensor:
        case FileTensor():
            size = DTYPE_BITS[tensor.meta.dtype] // 8
            yield from ((extent.path, extent.offset + extent.numel * size) for extent in tensor.extents)
        case CastTensor() | ScaledTensor():
            yield from _ends(tensor.source)
        case AveragedTensor():
            for source in tensor.sources:
                yield from _ends(source)
        case CodedTensor():
            for array in tensor.arrays.values():
                yield from _ends(array)
            if tensor.base is not None:
                yield from _ends(tensor.base)
        case InlineTensor():
            pass
