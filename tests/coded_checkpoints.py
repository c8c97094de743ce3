"""Checkpoints with layers in codes, made of real ones with the real kernels; and the dullest way to read codes.

``decode_slowly`` follows section 7 of the specification word by word, in torch, with nothing from ``codecs.decoding``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zstandard

from llmtailor.checkpoint import open_checkpoint
from llmtailor.codecs import BASE_KEY, CODES_KEY, Component, StoredCodes, array_name, component_of, record_codes
from llmtailor.codecs.encoding import KERNELS, pack_frame
from llmtailor.codecs.stored import BLOCK_NUMEL, FRAME_NUMEL
from llmtailor.formats.safetensors import open_file, plan_layout
from llmtailor.manifest import MANIFEST_NAME, EncodingRecord, FileRecord, LayerRecord, digest_of, encode_manifest
from llmtailor.state_keys import NOTES_KEY
from llmtailor.tensor_bytes import torch_dtype
from llmtailor.tensors import TensorMeta
from tensor_content import host_bytes, tensor_from_bytes

FLOATS = ("F32", "BF16", "F16")
SPELLING = {torch_dtype(name): name for name in (*FLOATS, "F64", "I64", "I16", "U16", "I8", "U8", "BOOL")}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How the layers of a checkpoint are coded; small tensors too, unlike in ``Rest``."""

    base: str
    weights: str
    """Codec of F32 weights; those of 16 bits are ``xor``, or left alone where the weights file is new."""
    first: str
    second: str


POLICIES = {
    "q8": Policy(base="exact", weights="delta8", first="int8", second="log8"),
    "q4": Policy(base="exact", weights="delta4", first="int4", second="log4"),
    "kept": Policy(base="exact", weights="exact", first="exact", second="exact"),
    "compact": Policy(base="rounded", weights="tail8", first="int8", second="log8"),
    "compact4": Policy(base="rounded", weights="tail4", first="int4", second="log4"),
    "moments": Policy(base="none", weights="exact", first="int8", second="log8"),
    "nothing": Policy(base="none", weights="exact", first="exact", second="exact"),
}


def meta_of(tensor: torch.Tensor) -> TensorMeta:
    return TensorMeta(dtype=SPELLING[tensor.dtype], shape=tuple(tensor.shape))


def encode_slowly(codec: str, tensor: torch.Tensor, base: torch.Tensor | None) -> tuple[Tensors, torch.Tensor | None]:
    """The arrays of a tensor's codes, and the rounded tensor of ``tail``."""
    stored = StoredCodes(codec=codec, meta=meta_of(tensor))
    if codec == "exact":
        return {"values": tensor}, None
    if codec == "xor":
        assert base is not None
        return pack_frames(tensor, base), None
    filled = [None if each is None else fill_up(each.reshape(-1)) for each in (tensor, base)]
    assert filled[0] is not None
    *found, _ = KERNELS[codec](filled[0], filled[1] if codec.startswith("delta") else None)
    arrays = {}
    for (name, meta), array in zip(stored.arrays.items(), found, strict=True):
        arrays[name] = array[: meta.numel].view(torch_dtype(meta.dtype))
    return arrays, tensor.bfloat16() if codec.startswith("tail") else None


def pack_frames(tensor: torch.Tensor, base: torch.Tensor) -> Tensors:
    compressor = zstandard.ZstdCompressor(level=1, write_content_size=True)
    pieces = zip(tensor.reshape(-1).split(FRAME_NUMEL), base.reshape(-1).split(FRAME_NUMEL), strict=True)
    frames = [pack_frame(values, against, compressor) for values, against in pieces]
    ends = [sum(map(len, frames[: index + 1])) for index in range(len(frames))]
    planes = torch.frombuffer(bytearray(b"".join(frames)), dtype=torch.uint8)
    return {"planes": planes, "ends": torch.tensor(ends, dtype=torch.int64)}


def fill_up(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, -values.numel() % BLOCK_NUMEL))


def decode_slowly(codec: str, meta: TensorMeta, arrays: Tensors, base: torch.Tensor | None) -> torch.Tensor:
    """What codes stand for."""
    if codec == "exact":
        return arrays["values"]
    numel = meta.numel
    if codec == "xor":
        assert base is not None
        bits = bits_of(base).reshape(-1) ^ _unpack_frames(arrays, numel)
        return bits.to(torch.int16).view(torch_dtype(meta.dtype)).reshape(meta.shape)
    codes = arrays["codes"].long() if codec.endswith("8") else unpack_nibbles(arrays["codes"])[:numel]

    def spread(name: str) -> torch.Tensor:
        return bits_of(arrays[name]).repeat_interleave(BLOCK_NUMEL)[:numel]

    if codec.startswith(("int", "delta")):
        signed = codes if codec.endswith("8") else codes - 8
        values = signed.float() * (spread("scales") << 16).to(torch.int32).view(torch.float32)
        values = values if codec.startswith("int") else base.reshape(-1) + values  # type: ignore[union-attr]
    elif codec.startswith("log"):
        low, step = spread("lows") << 16, spread("steps") << (8 if codec == "log8" else 12)
        bits = torch.where(codes == 0, 0, (low + (codes - 1) * step).clamp_max(0x7F7FFFFF))
        values = bits.to(torch.int32).view(torch.float32)
    else:
        assert base is not None
        tail = codes << 8 if codec == "tail8" else (codes - 8) << 12
        values = wrap((bits_of(base).reshape(-1) << 16) + tail).view(torch.float32)
    return values.to(torch_dtype(meta.dtype)).reshape(meta.shape)


def bits_of(halves: torch.Tensor) -> torch.Tensor:
    """16-bit elements as numbers >= 0."""
    return halves.view(torch.int16).long() & 0xFFFF


def wrap(bits: torch.Tensor) -> torch.Tensor:
    return ((bits + 2**31) % 2**32 - 2**31).to(torch.int32)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    blocks = packed.long().reshape(-1, BLOCK_NUMEL // 2)
    return torch.cat([blocks & 15, blocks >> 4], 1).reshape(-1)


def _unpack_frames(arrays: Tensors, numel: int) -> torch.Tensor:
    content, bits, start = host_bytes(arrays["planes"]), [], 0
    for end in arrays["ends"].tolist():
        count = min(FRAME_NUMEL, numel - sum(map(len, bits)))
        frame = content[start:end]
        planes = frame if len(frame) == 2 * count else zstandard.ZstdDecompressor().decompress(frame)
        low, high = torch.frombuffer(bytearray(planes), dtype=torch.uint8).long().reshape(2, count)
        bits.append(low | high << 8)
        start = end
    return torch.cat(bits)


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A checkpoint with codes, and what has to be read from it."""

    path: Path
    truth: Tensors = field(default_factory=dict)
    """By key (fqn, ``state.<fqn>.<leaf>``), of all layers."""


def read_tensors(path: Path) -> Tensors:
    """Every tensor of a layer file."""
    file = open_file(path)
    return {
        name: tensor_from_bytes(file.tensor_bytes(name), stored.meta) for name, stored in file.header.tensors.items()
    }


def code_layers(newer: Path, older: Path, output: Path, policies: Mapping[str, str]) -> Coded:
    """The checkpoint that a save of ``newer``'s state would have left, with some layers as codes.

    Args:
        newer: A checkpoint of a run.
        older: An earlier one, whose files are what exact bases are.
        output: The new directory.
        policies: Layer -> name of a policy; the others stay as they are.
    """
    shutil.copytree(newer, output)
    opened, before = open_checkpoint(newer), {each.name: each for each in open_checkpoint(older).manifest.layers}
    truth: Tensors = {}
    records = []
    for layer in opened.manifest.layers:
        live = {key: value for file in layer.files for key, value in read_tensors(newer / file.path).items()}
        if layer.name not in policies:
            truth |= live
            records.append(layer)
            continue
        policy = POLICIES[policies[layer.name]]
        if policy.base == "exact":
            for file in before[layer.name].files:
                (output / file.path).unlink()
                shutil.copy(older / file.path, output / file.path)
        elif layer.optimizer is not None:
            (output / layer.optimizer.path).unlink()
        plain = before[layer.name] if policy.base == "exact" else layer
        notes = None if layer.optimizer is None else open_file(newer / layer.optimizer.path).header.metadata
        record, found = _code_layer(output, layer, plain, live, policies[layer.name], (notes or {}).get(NOTES_KEY))
        truth |= found
        records.append(record)
    write_manifest(output, records)
    return Coded(path=output, truth=truth)


def _code_layer(
    output: Path, layer: LayerRecord, plain: LayerRecord, live: Tensors, name: str, notes: str | None
) -> tuple[LayerRecord, Tensors]:
    policy = POLICIES[name]
    earlier = read_tensors(output / plain.weights.path)
    codes: dict[str, StoredCodes] = {}
    arrays, truth, weights = {}, {}, {}
    for key, tensor in live.items():
        codec = _codec_for(key, tensor, policy)
        if codec is None:
            truth[key] = weights[key] = tensor
            continue
        codes[key] = StoredCodes(codec=codec, meta=meta_of(tensor))
        found, rounded = encode_slowly(codec, tensor, earlier.get(key))
        if rounded is not None:
            weights[key] = rounded
        base = earlier.get(key) if rounded is None else rounded
        truth[key] = decode_slowly(codec, meta_of(tensor), found, base)
        arrays |= {array_name(key, array): value for array, value in found.items()}
    if policy.base != "exact":
        plain = plain.model_copy(update={"optimizer": None, "update_count": None})
        written = write_tensors(output / plain.weights.path, weights, {"format": "pt"})
        plain = plain.model_copy(update={"weights": written.model_copy(update={"path": plain.weights.path})})
    metadata = {CODES_KEY: record_codes(codes), "format": "pt"}
    if notes is not None:
        metadata[NOTES_KEY] = notes
    if policy.base == "exact":
        metadata[BASE_KEY] = plain.weights.digest
    path = f"codes/{Path(layer.weights.path).name.removeprefix('model-')}"
    file = write_tensors(output / path, arrays, metadata).model_copy(update={"path": path})
    encoding = EncodingRecord(
        step=layer.step,
        save_index=layer.save_index,
        update_count=layer.update_count,
        rest=name,
        base=policy.base,  # type: ignore[arg-type]
        codes=file,
        errors={},
    )
    return plain.model_copy(update={"encoding": encoding, "reason": "coded"}), truth


def _codec_for(key: str, tensor: torch.Tensor, policy: Policy) -> str | None:
    """None for weights that the weights file holds as they are."""
    component = component_of(key)
    is_float = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if component is Component.WEIGHTS:
        if policy.base == "exact":
            if not is_float or policy.weights == "exact":
                return "exact"
            return policy.weights if tensor.dtype is torch.float32 else "xor"
        return policy.weights if policy.base == "rounded" and tensor.dtype is torch.float32 else None
    if not is_float or component is Component.OTHER:
        return "exact"
    return policy.first if component is Component.FIRST else policy.second


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> FileRecord:
    """A layer file; what was there is replaced."""
    content = {name: (meta_of(tensor), host_bytes(tensor)) for name, tensor in tensors.items()}
    return write_arrays(path, content, metadata)


def write_arrays(path: Path, arrays: Mapping[str, tuple[TensorMeta, bytes]], metadata: Mapping[str, str]) -> FileRecord:
    layout = plan_layout([(name, meta) for name, (meta, _) in arrays.items()], metadata)
    content = layout.prefix + b"".join(arrays[stored.name][1] for stored in layout.tensors)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    path.chmod(0o444)
    return FileRecord(path=path.name, bytes=len(content), digest=digest_of(content))


def write_manifest(checkpoint: Path, layers: list[LayerRecord], **changes: Any) -> None:
    """Replace layers of a checkpoint's manifest, digest and all right."""
    manifest = open_checkpoint(checkpoint).manifest
    path = checkpoint / MANIFEST_NAME
    path.unlink()
    fields = {name: getattr(manifest, name) for name in type(manifest).model_fields}
    path.write_bytes(encode_manifest(type(manifest)(**(fields | {"layers": tuple(layers)} | changes)))[0])


Change = Callable[[dict[str, tuple[TensorMeta, bytes]], dict[str, str]], None]
"""Changes the arrays and the metadata of a codes file."""


def change_codes(checkpoint: Path, layer: str, change: Change) -> None:
    """Have a checkpoint hold another codes file, published as if a save had written it."""
    layers = list(open_checkpoint(checkpoint).manifest.layers)
    index = next(index for index, each in enumerate(layers) if each.name == layer)
    encoding = layers[index].encoding
    assert encoding is not None
    file = open_file(checkpoint / encoding.codes.path)
    arrays = {name: (stored.meta, bytes(file.tensor_bytes(name))) for name, stored in file.header.tensors.items()}
    metadata = dict(file.header.metadata)
    del file
    change(arrays, metadata)
    record = write_arrays(checkpoint / encoding.codes.path, arrays, metadata)
    codes = record.model_copy(update={"path": encoding.codes.path})
    layers[index] = layers[index].model_copy(update={"encoding": encoding.model_copy(update={"codes": codes})})
    write_manifest(checkpoint, layers)


def make_writable(directory: Path) -> None:
    """Have the files of a copy be changed in place."""
    for path in directory.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
