"""Checkpoints as several ranks write them, cut out of a whole one: no ranks are needed."""

from __future__ import annotations

import itertools
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file

from faults import overwrite
from llmtailor.checkpoint import Checkpoint, open_checkpoint
from llmtailor.checkpointer import Checkpointer
from llmtailor.formats.safetensors import open_file, plan_layout
from llmtailor.formats.tailored import encode_shards
from llmtailor.manifest import (
    INDEX_NAME,
    MANIFEST_NAME,
    FileRecord,
    LayerRecord,
    PartRecord,
    World,
    digest_of,
    encode_manifest,
)
from llmtailor.shards import Shard, whole_shard
from llmtailor.tensor_bytes import meta_of
from tensor_content import host_bytes

Cut: TypeAlias = Callable[[str, tuple[int, ...]], Sequence[Shard | None]]
"""Name and shape of a tensor -> what each rank holds of it."""

DIGEST = "xxh3_128:" + "0123456789abcdef" * 2


class Mixed(torch.nn.Module):
    """Of several types, sizes that no number divides, a buffer, a scalar, one that is empty, one that is frozen."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Linear(7, 11, dtype=torch.bfloat16)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(5, 3), torch.nn.Linear(3, 5)])
        self.norm = torch.nn.BatchNorm1d(5)
        self.cube = torch.nn.Parameter(torch.randn(3, 5, 2))
        self.strided = torch.nn.Parameter(torch.randn(6, 5).t())
        self.scale = torch.nn.Parameter(torch.randn(()))
        self.empty = torch.nn.Parameter(torch.empty(0, 3))
        self.frozen = torch.nn.Parameter(torch.randn(9), requires_grad=False)


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.1, amsgrad=True)


def train(seed: int) -> tuple[Mixed, torch.optim.Optimizer]:
    """A model after a step, its optimizer with tensors, numbers and text among its state."""
    model = Mixed(seed)
    optimizer = make_optimizer(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.state[model.cube]["count"] = 3
    optimizer.state[model.cube]["mode"] = "fast"
    return model, optimizer


def save_whole(run: Path, seed: int = 1) -> Checkpoint:
    model, optimizer = train(seed)
    checkpointer = Checkpointer(run)
    path = checkpointer.save(7, model, [optimizer], lambda directory: None).result()
    checkpointer.close()
    return open_checkpoint(path)


# Ways to cut a tensor


def boxes(*mesh: int) -> Cut:
    """Dim 0 over the first axis of a mesh, dim 1 over the second, as ``torch.chunk`` does; the last may get nothing."""

    def cut(name: str, shape: tuple[int, ...]) -> Sequence[Shard | None]:
        found: list[Shard | None] = []
        for rank in range(math.prod(mesh)):
            index = (rank // math.prod(mesh[1:]), rank % math.prod(mesh[1:]))[: len(mesh)]
            offsets, sizes = [0] * len(shape), [*shape]
            is_mine = True
            for axis, (at, count) in enumerate(zip(index, mesh, strict=True)):
                if axis >= len(shape):
                    is_mine = is_mine and at == 0
                    continue
                share = -(-shape[axis] // count)
                offsets[axis] = min(at * share, shape[axis])
                sizes[axis] = min(share, shape[axis] - offsets[axis])
            shard = Shard(shape=shape, offsets=tuple(offsets), sizes=tuple(sizes))
            found.append(shard if is_mine and shard.numel else None)
        return found

    return cut


def columns(ranks: int) -> Cut:
    return boxes(1, ranks)


def runs(ranks: int, partition: int = 20) -> Cut:
    """Each rank has the elements of a partition of a flat tensor, in which this one starts somewhere."""

    def cut(name: str, shape: tuple[int, ...]) -> Sequence[Shard | None]:
        numel, start = math.prod(shape), len(name) * 7 % partition
        share = max(partition, -(-(start + numel) // ranks))
        found: list[Shard | None] = []
        for rank in range(ranks):
            first, last = (min(max(at - start, 0), numel) for at in (rank * share, (rank + 1) * share))
            shard = Shard(shape=shape, offsets=(first,), sizes=(last - first,), is_run=True)
            found.append(shard if shard.numel else None)
        return found

    return cut


def whole_on(rank: int) -> Cut:
    return lambda name, shape: [*[None] * rank, whole_shard(shape)]


def scattered(seed: int) -> Cut:
    """Some tensors in runs, others in grids, with random cuts; which rank has which piece is random too."""

    def cut(name: str, shape: tuple[int, ...]) -> Sequence[Shard | None]:
        random = Random(f"{seed} {name}")
        is_run = random.random() < 0.4
        space = (math.prod(shape),) if is_run else shape
        edges = [sorted([0, size, *(random.randint(0, size) for _ in range(random.randint(0, 2)))]) for size in space]
        pieces: list[Shard | None] = [
            Shard(
                shape=shape,
                offsets=tuple(start for start, _ in piece),
                sizes=tuple(end - start for start, end in piece),
                is_run=is_run,
            )
            for piece in itertools.product(*map(itertools.pairwise, edges))
        ]
        random.shuffle(pieces)
        return [shard if shard is not None and shard.numel else None for shard in pieces]

    return cut


CUTS: dict[str, Cut] = {
    "rows of 2": boxes(2),
    "rows of 4": boxes(4),
    "rows of 13": boxes(13),
    "columns of 3": columns(3),
    "grid of 2 x 2": boxes(2, 2),
    "grid of 3 x 2": boxes(3, 2),
    "runs of 2": runs(2),
    "runs of 5": runs(5),
    "runs of 40": runs(40, 3),
    "all on rank 1": whole_on(1),
}


def take(tensor: torch.Tensor, shard: Shard) -> torch.Tensor:
    """What a rank holds of a tensor, in memory of its own."""
    whole = tensor.detach().reshape(-1) if shard.is_run else tensor.detach()
    slices = tuple(slice(at, at + size) for at, size in zip(shard.offsets, shard.sizes, strict=True))
    return whole[slices].clone(memory_format=torch.contiguous_format)


# Files


@dataclass(frozen=True)
class PartFile:
    """A file of one rank, before it is written."""

    tensors: Mapping[str, torch.Tensor]
    shards: Mapping[str, Shard]
    metadata: Mapping[str, str]

    def encode(self) -> bytes:
        metas = [(name, meta_of(tensor)) for name, tensor in self.tensors.items()]
        layout = plan_layout(metas, {"format": "pt", **self.metadata, **encode_shards(self.shards)})
        return layout.prefix + b"".join(bytes(host_bytes(self.tensors[each.name])) for each in layout.tensors)


Change: TypeAlias = Callable[[str, PartFile], PartFile | bytes | None]
"""Path and file -> what is written there instead; None for no file."""


def cut_checkpoint(
    source: Checkpoint,
    output: Path,
    cut: Cut,
    *,
    kinds: Sequence[str] = ("weights", "optimizer"),
    change: Change = lambda path, file: file,
) -> Checkpoint:
    """Write a whole checkpoint as ranks would that hold it cut; what has no dims is rank 0's.

    Args:
        source: Without codes.
        output: Directory to be made.
        cut: Of each tensor.
        kinds: What is cut; the rest stays in whole files.
        change: A mistake to make; the manifest has the digests of what was written.
    """
    shutil.copytree(source.path, output)
    layers = tuple(_cut_layer(output, layer, cut, kinds, change) for layer in source.manifest.layers)
    size = 1 + max((part.rank for layer in layers for part in layer.parts), default=0)
    manifest = source.manifest.model_copy(
        update={
            "layers": layers,
            "world": World(size=size, sharding="sharded", layout=DIGEST),
            "files": tuple(file for file in source.manifest.files if file.path != INDEX_NAME),
        }
    )
    (output / INDEX_NAME).unlink(missing_ok=True)
    overwrite(output / MANIFEST_NAME, encode_manifest(manifest)[0])
    return open_checkpoint(output)


def _cut_layer(output: Path, layer: LayerRecord, cut: Cut, kinds: Sequence[str], change: Change) -> LayerRecord:
    of_rank: dict[int, dict[str, FileRecord]] = defaultdict(dict)
    update: dict[str, Any] = {}
    for kind in kinds:
        record: FileRecord | None = getattr(layer, kind)
        if record is None:
            continue
        path = output / record.path
        stem = record.path.removesuffix(".safetensors")
        for rank, file in enumerate(cut_file(path, cut)):
            name = f"{stem}.rank-{rank:05}.safetensors"
            changed = change(name, file) if file.tensors else None
            if changed is None:
                continue
            content = changed if isinstance(changed, bytes) else changed.encode()
            (output / name).write_bytes(content)
            of_rank[rank][kind] = FileRecord(path=name, bytes=len(content), digest=digest_of(content))
        path.unlink()
        update[kind] = None
    parts = [
        PartRecord(rank=rank, weights=files.get("weights"), optimizer=files.get("optimizer"))
        for rank, files in sorted(of_rank.items())
    ]
    return layer.model_copy(update={**update, "parts": tuple(parts)})


def cut_file(path: Path, cut: Cut) -> list[PartFile]:
    """The parts of a file, by rank; those without a tensor too."""
    tensors, metadata = load_file(path), dict(open_file(path).header.metadata)
    metadata.pop("format")
    held: dict[int, dict[str, Shard]] = defaultdict(dict)
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        shards = cut(name, shape) if shape and tensor.numel() else [whole_shard(shape)]
        for rank, shard in enumerate(shards):
            if shard is not None:
                held[rank][name] = shard
    return [
        PartFile(
            tensors={name: take(tensors[name], shard) for name, shard in held[rank].items()},
            shards=held[rank],
            metadata=metadata if rank == min(held) else {},
        )
        for rank in range(1 + max(held))
    ]


def without(file: PartFile, name: str) -> PartFile:
    return PartFile(
        tensors={key: tensor for key, tensor in file.tensors.items() if key != name},
        shards={key: shard for key, shard in file.shards.items() if key != name},
        metadata=file.metadata,
    )


def with_metadata(file: PartFile, **metadata: str) -> bytes:
    """The file with other metadata: what a hostile author would write."""
    metas = [(name, meta_of(tensor)) for name, tensor in file.tensors.items()]
    texts = {"format": "pt", **file.metadata, **encode_shards(file.shards), **metadata}
    layout = plan_layout(metas, texts)
    return layout.prefix + bytes(layout.nbytes - len(layout.prefix))


def with_shard(file: PartFile, name: str, shard: Shard, tensor: torch.Tensor) -> PartFile:
    """The file with another shard of one tensor."""
    return replace(file, tensors={**file.tensors, name: take(tensor, shard)}, shards={**file.shards, name: shard})
