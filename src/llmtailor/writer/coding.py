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
from ..codecs.kernels import KernelKey, Kernels, master_codec
from ..codecs.stored import BLOCK_NUMEL, FRAME_NUMEL
from ..errors import WriteError
from ..tensor_bytes import meta_of
from .base_file import BaseLayer
from .coded_images import CodedImage, codes_image, rounded_image
from .copying import flat_elements
from .devices import Lanes
from .images import FileImage, LayerImage
from .packing import pack_masters
from .scratch import Scratch

__all__ = ["EncodedLayer", "LayerEncoder"]

# Sums of squares of larger values, and scales of blocks that hold them, might overflow.
_LARGEST = 2.0**120
# Level 1 packs nearly as well as 3 and twice as fast.
_ZSTD_LEVEL = 1
# After so many elements (and a strip) a tensor is looked at anew: is its memory still there?
_CHECKED_NUMEL = 2**21


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
        self._scratch = Scratch()
        self._compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_content_size=True)

    @property
    def scratch_nbytes(self) -> int:
        """Host memory it holds."""
        return self._scratch.nbytes

    def close(self) -> None:
        """Let go of the memory."""
        self._scratch.close()

    def compile(self, images: Sequence[CodedImage]) -> None:
        """Get ready for such layers; costs something on the first call alone. Called by the training thread."""
        keys: set[KernelKey] = set()
        numel = 0
        for image in images:
            weights = image.weights_of_masters
            for key, stored, tensor in image.tensors():
                if stored.codec in KERNELS:
                    codec = _kernel_name(stored.codec, weights[key][1] if key in weights else None)
                    keys.add((codec, tensor.dtype, tensor.device))
                    numel += tensor.numel()
        self._kernels.compile(keys, numel)

    def encode(
        self, coded: CodedImage, base: BaseLayer | None, check_readable: Callable[[], None]
    ) -> EncodedLayer | None:
        """Encode a layer.

        Args:
            coded: The layer, planned and held.
            base: What its weights and masters are relative to, for codes that are.
            check_readable: Called before each piece of a tensor is read; raises if that must not be.

        Returns:
            None if a component would be further from the truth than allowed.

        Raises:
            FormatError, IntegrityError: The base is not what it should be.
            WriteError: There is not enough memory.
        """
        with _translate_memory_errors():
            return self._encode(coded, base, check_readable)

    def pack(self, image: LayerImage, check_readable: Callable[[], None]) -> tuple[FileImage, ...]:
        """The files of a layer that is written exactly; see ``pack_masters``.

        Raises:
            WriteError: There is not enough memory.
        """
        with _translate_memory_errors():
            return pack_masters(image, self._scratch, self._lanes, check_readable)

    def _encode(
        self, coded: CodedImage, base: BaseLayer | None, check_readable: Callable[[], None]
    ) -> EncodedLayer | None:
        is_pinned = any(tensor.is_cuda for _, _, tensor in coded.tensors())
        self._scratch.reserve(_scratch_sizes(coded), is_pinned=is_pinned)
        source = _Source(base=base, check_readable=check_readable)
        masters = coded.weights_of_masters
        items = {
            key: _Item(key=key, stored=stored, tensor=tensor, weight=masters[key][1] if key in masters else None)
            for key, stored, tensor in coded.tensors()
        }
        found: list[_EncodedTensor] = []
        try:
            begun: list[_Begun] = []
            for item in items.values():
                if item.stored.codec != "round":  # that comes with its master
                    with self._lanes.of(item.tensor):
                        begun.append(self._begin(item, source))
            # Only now, for whoever looks at a measure waits for its device, which could go on meanwhile.
            for each in begun:
                with self._lanes.of(each.item.tensor):
                    if each.item.weight is None:
                        found.append(_judge(each) or _keep(each.item))
                    else:
                        found += self._end_master(each, items.get(masters[each.item.key][0]), source)
        finally:
            self._lanes.synchronize()  # until then codes of a device are on their way to the scratch
        parts: dict[Component, list[Deviation]] = defaultdict(list)
        for encoded in found:
            component = component_of(encoded.key)
            # What is said of weights is said of what they are the rounding of, too.
            parts[Component.WEIGHTS if component is Component.MASTER else component].append(encoded.deviation)
        total = {component: Deviation.of(deviations) for component, deviations in parts.items()}
        # Written so that an error which is no number is too large.
        if not all(deviation.l2 <= coded.rest.limit(component) for component, deviation in total.items()):
            return None
        return _finish(coded, found, total, base)

    def _end_master(self, begun: _Begun, weight: _Item | None, source: _Source) -> Iterator[_EncodedTensor]:
        """A master and, unless the weights file holds it as it is, its weight."""
        found = _judge(begun)
        is_rounded = found is not None and found.of_weight is not None
        if weight is None:
            # Relative to the weight, which it says nothing about unless it rounds to that.
            yield found if found is not None and is_rounded else _keep(begun.item)
            return
        yield found or _keep(begun.item)
        if found is not None and found.of_weight is not None:
            yield _EncodedTensor(key=weight.key, stored=weight.stored, arrays={}, deviation=found.of_weight)
        else:
            packed = replace(weight, stored=replace(weight.stored, codec="xor"))
            yield self._pack(packed, source) or _keep(packed)

    def _begin(self, item: _Item, source: _Source) -> _Begun:
        """Have the codes of a tensor made; those of a device may not be there yet."""
        key, stored, tensor, base = item.key, item.stored, item.tensor, source.base
        if stored.codec == "exact":
            return _Begun(item=item, encoded=_keep(item))
        if stored.base == "exact":
            assert base is not None
            if item.weight is None:
                base.check(key, stored.meta)
            elif not base.has_master(key, stored.meta):
                return _Begun(item=item, encoded=None)
        if stored.codec == "xor":
            return _Begun(item=item, encoded=self._pack(item, source))
        arrays = {name: self._scratch.take(meta.dtype, meta.numel) for name, meta in stored.arrays.items()}
        measures: list[torch.Tensor] = []
        of_weight: list[torch.Tensor] = []
        strip = self._kernels.strip_numel(tensor.device)
        for start in range(0, tensor.numel(), strip):
            stop = min(start + strip, tensor.numel())
            if start % _CHECKED_NUMEL == 0:
                source.check_readable()
            found = self._encode_strip(item, base, start, stop)
            if item.weight is not None:
                of_weight.append(found.pop())
            measures.append(found.pop())
            for target, array in zip(arrays.values(), found, strict=True):
                _copy_strip(array, target, start, -(-(stop - start) // BLOCK_NUMEL))
        encoded = _EncodedTensor(key=key, stored=stored, arrays=arrays, deviation=Deviation())
        return _Begun(item=item, encoded=encoded, measures=measures, of_weight=of_weight)

    def _encode_strip(self, item: _Item, base: BaseLayer | None, start: int, stop: int) -> list[torch.Tensor]:
        """What a kernel makes of some elements."""
        values = _to_blocks(flat_elements(item.tensor, start, stop))
        of_base = None
        if item.stored.base == "exact" and base is not None:
            read = base.read if item.weight is None else base.read_master
            of_base = _to_blocks(read(item.key, start, stop).to(values.device))
        kernel = self._kernels.get(_kernel_name(item.stored.codec, item.weight), values)
        with torch.no_grad():
            if item.weight is None:
                return list(kernel(values, of_base))
            return list(kernel(values, of_base, _to_blocks(flat_elements(item.weight, start, stop))))

    def _pack(self, item: _Item, source: _Source) -> _EncodedTensor | None:
        stored, base = item.stored, source.base
        assert base is not None
        planes = self._scratch.take("U8", stored.meta.nbytes)
        ends: list[int] = []
        filled = 0
        for start in range(0, item.tensor.numel(), FRAME_NUMEL):
            stop = min(start + FRAME_NUMEL, item.tensor.numel())
            source.check_readable()
            values = flat_elements(item.tensor, start, stop).cpu()
            frame = pack_frame(values, base.read(item.key, start, stop), self._compressor)
            planes.numpy()[filled : filled + len(frame)] = np.frombuffer(frame, np.uint8)
            filled += len(frame)
            ends.append(filled)
        if filled >= stored.meta.nbytes:
            return None
        arrays = {"planes": planes[:filled], "ends": torch.tensor(ends, dtype=torch.int64)}
        return _EncodedTensor(key=item.key, stored=stored, arrays=arrays, deviation=Deviation())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """What is read while a layer is encoded."""

    base: BaseLayer | None
    check_readable: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """A tensor that is to be encoded."""

    key: str
    stored: StoredCodes
    tensor: torch.Tensor
    weight: torch.Tensor | None = None
    """Of a master: the weight that it should round to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _EncodedTensor:
    """A tensor as codes."""

    key: str
    stored: StoredCodes
    arrays: Mapping[str, torch.Tensor]
    deviation: Deviation
    """Without a norm where it is exact: limits are for what is not."""
    of_weight: Deviation | None = None
    """Of a master: how far its codes, rounded, are from the weight; None if it does not round to that itself."""

    @property
    def is_weight(self) -> bool:
        return component_of(self.key) is Component.WEIGHTS


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """A tensor whose codes are being made."""

    item: _Item
    encoded: _EncodedTensor | None
    """What it becomes, unless the measures say otherwise; None if it has to stay as it is."""
    measures: Sequence[torch.Tensor] = ()
    """Of each strip; none where nothing was rounded."""
    of_weight: Sequence[torch.Tensor] = ()
    """Of a master, the measures of its weight."""


def _judge(begun: _Begun) -> _EncodedTensor | None:
    """What became of a tensor; None if it has to stay as it is."""
    encoded = begun.encoded
    if encoded is None or not begun.measures:
        return encoded
    deviation = _sum_up(encoded.stored.codec, begun.measures)
    if deviation is None:
        return None
    of_weight = _sum_up_weight(begun.of_weight) if begun.of_weight else None
    return replace(encoded, deviation=deviation, of_weight=of_weight)


def _keep(item: _Item) -> _EncodedTensor:
    """A tensor as it is."""
    return _EncodedTensor(
        key=item.key, stored=replace(item.stored, codec="exact"), arrays={"values": item.tensor}, deviation=Deviation()
    )


def _finish(
    coded: CodedImage,
    found: Sequence[_EncodedTensor],
    deviations: Mapping[Component, Deviation],
    base: BaseLayer | None,
) -> EncodedLayer:
    weights: tuple[FileImage, ...] = ()
    if coded.base != "exact":
        # Weights that are not rounded are there as they are.
        found = [each for each in found if each.stored.base == "rounded" or not each.is_weight]
        weights = (rounded_image(coded, {each.key for each in found if each.is_weight}),)
    digests = (None, None) if base is None else (base.digest, base.state_digest)
    codes = {each.key: each.stored for each in found}
    arrays = {array_name(each.key, name): array for each in found for name, array in each.arrays.items()}
    return EncodedLayer(
        files=(*weights, codes_image(coded, codes, arrays, *digests)),
        base_digest=digests[0],
        deviations={component: each for component, each in deviations.items() if not each.is_exact},
    )


def _kernel_name(codec: str, weight: torch.Tensor | None) -> str:
    return codec if weight is None else master_codec(codec, meta_of(weight).dtype)


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


def _to_blocks(values: torch.Tensor) -> torch.Tensor:
    """A row a block, the last one filled up with zeros."""
    missing = -values.numel() % BLOCK_NUMEL
    return (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, BLOCK_NUMEL)


def _copy_strip(array: torch.Tensor, target: torch.Tensor, start: int, blocks: int) -> None:
    """Put what a kernel made of a strip where it belongs; what is of no element is left out.

    From a CUDA device the copy is only queued: the next strip's kernel runs meanwhile.

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
        into.copy_(source, non_blocking=True)


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


def _sum_up_weight(measures: Sequence[torch.Tensor]) -> Deviation | None:
    """The deviation of a weight that is to be its rounded master; None if it is not."""
    is_rounded = not bool(torch.stack([each[-1] for each in measures]).any())
    return _sum_up("round", [each[:-1] for each in measures]) if is_rounded else None


def _factor_of(ulps: float) -> float:
    """The largest factor between two F32 that are so many numbers apart."""
    doublings, rest = divmod(ulps / 2**23, 1.0)
    return float(2.0**doublings * (1.0 + rest))


def _scratch_sizes(coded: CodedImage) -> Iterator[int]:
    """Bytes of what may have to be taken of the scratch."""
    for stored in coded.codes.values():
        if stored.codec != "exact":
            yield from (meta.nbytes for meta in stored.arrays.values())
        if stored.codec in ("xor", "round"):  # a weight that is not its rounded master is packed
            yield stored.meta.nbytes
