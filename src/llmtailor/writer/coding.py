"""A layer into codes, strip by strip, on the device where it lives; for the capture thread.

    live strip (and the same strip of the base, read back) -> kernel -> arrays, errors -> scratch in host memory
    all strips of a layer -> are the errors within limits? -> images of its files, which are captured like any other

The scratch holds the codes of one layer, and is used again for the next. torch is called on strips that it works on in
the calling thread: what trains keeps the other cores.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import zstandard

from ..codecs import Component, Deviation, StoredCodes, array_name, component_of
from ..codecs.encoding import KERNELS, pack_frame
from ..codecs.kernels import KernelKey, Kernels
from ..codecs.stored import BLOCK_NUMEL, FRAME_NUMEL
from ..errors import WriteError
from ..tensor_bytes import torch_dtype
from .base_file import BaseFile
from .coded_images import CodedImage, codes_image, rounded_image
from .copying import row_major_blocks
from .devices import Lanes
from .images import FileImage

__all__ = ["EncodedLayer", "LayerEncoder"]

# Sums of squares of larger values, and scales of blocks that hold them, might overflow.
_LARGEST = 2.0**120
# Level 1 packs nearly as well as 3 and twice as fast.
_ZSTD_LEVEL = 1
# After so many elements (and a strip) a tensor is looked at anew: is its memory still there?
_CHECKED_NUMEL = 2**21
# Tensors of the scratch start at multiples of this, as every element type needs it.
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedLayer:
    """A layer as codes. Its images refer to scratch memory: capture them before the next layer is encoded."""

    files: tuple[FileImage, ...]
    """The weights file, if it is written anew, then the codes file."""
    base_digest: str | None
    """Of the weights file of an earlier step that the codes are relative to."""
    deviations: Mapping[Component, Deviation]
    """Those that are not exact."""


class LayerEncoder:
    """Encodes the layers of a run's saves.

    Args:
        lanes: Streams for tensors on devices.
    """

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._kernels = Kernels()
        self._scratch = _Scratch()
        self._compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_content_size=True)

    @property
    def scratch_nbytes(self) -> int:
        """Host memory it holds."""
        return self._scratch.nbytes

    def compile(self, images: Sequence[CodedImage]) -> None:
        """Get ready for such layers; costs something on the first call alone. Called by the training thread."""
        keys: set[KernelKey] = set()
        numel = 0
        for image in images:
            for _, stored, tensor in image.tensors():
                if stored.codec in KERNELS:
                    keys.add((stored.codec, tensor.dtype, tensor.device))
                    numel += tensor.numel()
        self._kernels.compile(keys, numel)

    def encode(
        self, coded: CodedImage, base: BaseFile | None, check_readable: Callable[[], None]
    ) -> EncodedLayer | None:
        """Encode a layer.

        Args:
            coded: The layer, planned and held.
            base: What its weights are relative to, for codes that are.
            check_readable: Called before each piece of a tensor is read; raises if that must not be.

        Returns:
            None if a component would be further from the truth than allowed.

        Raises:
            FormatError, IntegrityError: The base is not what it should be.
            WriteError: There is not enough memory.
        """
        with _translate_memory_errors():
            return self._encode(coded, base, check_readable)

    def _encode(
        self, coded: CodedImage, base: BaseFile | None, check_readable: Callable[[], None]
    ) -> EncodedLayer | None:
        self._scratch.reserve(coded)
        codes: dict[str, StoredCodes] = {}
        arrays: dict[str, torch.Tensor] = {}
        rounded: dict[str, torch.Tensor] = {}
        deviations: dict[Component, list[Deviation]] = defaultdict(list)
        for key, stored, tensor in coded.tensors():
            with self._lanes.of(tensor):
                found = self._encode_tensor(key, stored, tensor, base, check_readable)
            if found is None:  # not numbers that codes can stand for
                if stored.base == "rounded":
                    continue  # the weights file holds them as they are
                stored = replace(stored, codec="exact")
                found = _EncodedTensor(arrays={"values": tensor}, deviation=_exact())
            codes[key] = stored
            deviations[component_of(key)].append(found.deviation)
            arrays.update({array_name(key, name): array for name, array in found.arrays.items()})
            if found.rounded is not None:
                rounded[key] = found.rounded
        total = {component: Deviation.of(parts) for component, parts in deviations.items()}
        # Written so that an error which is no number is too large.
        if not all(each.l2 <= coded.rest.limit(component) for component, each in total.items()):
            return None
        return self._finish(coded, codes, arrays, rounded, total, base)

    def _finish(
        self,
        coded: CodedImage,
        codes: Mapping[str, StoredCodes],
        arrays: Mapping[str, torch.Tensor],
        rounded: Mapping[str, torch.Tensor],
        deviations: Mapping[Component, Deviation],
        base: BaseFile | None,
    ) -> EncodedLayer:
        digest = None if base is None else base.record.digest
        weights = () if coded.base == "exact" else (rounded_image(coded, rounded),)
        return EncodedLayer(
            files=(*weights, codes_image(coded, codes, arrays, digest)),
            base_digest=digest,
            deviations={component: each for component, each in deviations.items() if not each.is_exact},
        )

    def _encode_tensor(
        self,
        key: str,
        stored: StoredCodes,
        tensor: torch.Tensor,
        base: BaseFile | None,
        check_readable: Callable[[], None],
    ) -> _EncodedTensor | None:
        """The codes of a tensor; None if it has to stay as it is."""
        if stored.codec == "exact":
            return _EncodedTensor(arrays={"values": tensor}, deviation=_exact())
        if stored.base == "exact":
            assert base is not None
            base.check(key, stored.meta)
        if stored.codec == "xor":
            assert base is not None
            return self._pack(key, stored, tensor, base, check_readable)
        arrays = {name: self._scratch.take(meta.dtype, meta.numel) for name, meta in stored.arrays.items()}
        rounded = self._scratch.take("BF16", tensor.numel()) if stored.base == "rounded" else None
        targets = [*arrays.values(), *([] if rounded is None else [rounded])]
        measures: list[torch.Tensor] = []
        strip = self._kernels.strip_numel(tensor.device)
        for start in range(0, tensor.numel(), strip):
            stop = min(start + strip, tensor.numel())
            if start % _CHECKED_NUMEL == 0:
                check_readable()
            values = _to_blocks(_elements(tensor, start, stop))
            of_base = None
            if stored.base == "exact" and base is not None:
                of_base = _to_blocks(base.read(key, start, stop).to(tensor.device))
            with torch.no_grad():
                *found, measured = self._kernels.get(stored.codec, values)(values, of_base)
            measures.append(measured)
            for target, array in zip(targets, found, strict=True):
                _copy_strip(array, target, start, values.shape[0])
        deviation = _sum_up(stored.codec, measures)
        if deviation is None:
            return None
        halves = None if rounded is None else rounded.view(tensor.shape)
        return _EncodedTensor(arrays=arrays, deviation=deviation, rounded=halves)

    def _pack(
        self, key: str, stored: StoredCodes, tensor: torch.Tensor, base: BaseFile, check_readable: Callable[[], None]
    ) -> _EncodedTensor | None:
        planes = self._scratch.take("U8", stored.meta.nbytes)
        ends: list[int] = []
        filled = 0
        for start in range(0, tensor.numel(), FRAME_NUMEL):
            stop = min(start + FRAME_NUMEL, tensor.numel())
            check_readable()
            values = _elements(tensor, start, stop).cpu()
            frame = pack_frame(values, base.read(key, start, stop), self._compressor)
            planes.numpy()[filled : filled + len(frame)] = np.frombuffer(frame, np.uint8)
            filled += len(frame)
            ends.append(filled)
        if filled >= stored.meta.nbytes:
            return None
        arrays = {"planes": planes[:filled], "ends": torch.tensor(ends, dtype=torch.int64)}
        return _EncodedTensor(arrays=arrays, deviation=_exact())


@dataclass(frozen=True, slots=True, kw_only=True)
class _EncodedTensor:
    """A tensor as codes."""

    arrays: Mapping[str, torch.Tensor]
    deviation: Deviation
    rounded: torch.Tensor | None = None
    """What goes into the weights file instead of it."""


@contextlib.contextmanager
def _translate_memory_errors() -> Iterator[None]:
    """What costs a save must not cost the training."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as err:
        raise WriteError(
            "there is not enough memory to make codes of a layer",
            kind="device-memory" if isinstance(err, torch.OutOfMemoryError) else "host-memory",
            found=str(err).partition("\n")[0] or None,
            hint='leave some free, or save with rest="skip"; older checkpoints were not touched',
        ) from err


def _exact() -> Deviation:
    # The norm of what is exact does not matter: limits are for what is not.
    return Deviation()


def _elements(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Elements of a tensor in row-major order, flat; a view where that is possible."""
    blocks = [block.reshape(-1) for block in row_major_blocks(tensor, start, stop)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _to_blocks(values: torch.Tensor) -> torch.Tensor:
    """A row a block, the last one filled up with zeros."""
    missing = -values.numel() % BLOCK_NUMEL
    return (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, BLOCK_NUMEL)


def _copy_strip(array: torch.Tensor, target: torch.Tensor, start: int, blocks: int) -> None:
    """Put what a kernel made of a strip where it belongs; what is of no element is left out.

    Args:
        array: Of whole blocks.
        target: Of the whole tensor, in host memory.
        start: First element of the strip.
        blocks: Of the strip.
    """
    place = start // BLOCK_NUMEL * (array.numel() // blocks)
    count = min(array.numel(), target.numel() - place)
    source = array.view(_plain(array.dtype))[:count]
    into = target.view(_plain(target.dtype))[place : place + count]
    if source.is_cpu:
        # By numpy, which starts no threads of its own.
        np.copyto(into.numpy(), source.numpy())
    else:
        into.copy_(source)


def _plain(dtype: torch.dtype) -> torch.dtype:
    """What numpy knows of the same size."""
    return torch.int16 if dtype.itemsize == 2 else dtype


def _sum_up(codec: str, measures: Sequence[torch.Tensor]) -> Deviation | None:
    """The deviation of a tensor from the measures of its strips; None if it holds what codes cannot stand for."""
    rows = torch.stack(list(measures)).double().cpu()
    magnitude = float(rows[:, 3].max())
    if not bool(rows.isfinite().all()) or magnitude >= _LARGEST:
        return None
    weights = rows[:, 4].pow(-2)
    largest = float(rows[:, 2].max())
    if codec.startswith("log"):
        largest = _factor_of(largest) - 1
    else:
        largest = largest / magnitude if magnitude else 0.0
    return Deviation(
        error_sq=float((rows[:, 0] * weights).sum()), norm_sq=float((rows[:, 1] * weights).sum()), largest=largest
    )


def _factor_of(ulps: float) -> float:
    """The largest factor between two F32 that are so many numbers apart."""
    doublings, rest = divmod(ulps / 2**23, 1.0)
    return float(2.0**doublings * (1.0 + rest))


class _Scratch:
    """Host memory for the codes of one layer."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._taken = 0

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def reserve(self, coded: CodedImage) -> None:
        """Start anew, with room for what a layer may need."""
        self._taken = 0
        wanted = 0
        for stored in coded.codes.values():
            metas = [meta.nbytes for meta in stored.arrays.values()] if stored.codec != "exact" else []
            metas += [stored.meta.nbytes] if stored.codec == "xor" else []
            metas += [stored.meta.nbytes // 2] if stored.base == "rounded" else []
            wanted += sum(nbytes + _ALIGNMENT for nbytes in metas)
        if wanted > self._memory.nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old goes before the new comes
            try:
                self._memory = torch.empty(wanted, dtype=torch.uint8)
            except RuntimeError as err:  # torch has no word of its own for it
                raise MemoryError(f"{wanted} bytes: {err}") from err

    def take(self, dtype: str, numel: int) -> torch.Tensor:
        """Memory for a flat tensor."""
        element = torch_dtype(dtype)
        start = -(-self._taken // _ALIGNMENT) * _ALIGNMENT
        self._taken = start + numel * element.itemsize
        assert self._taken <= self._memory.nbytes
        return self._memory[start : self._taken].view(element)
