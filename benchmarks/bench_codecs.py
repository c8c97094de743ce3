"""How fast are tensors made into codes, and back, on one core?

Strips of fp32 numbers as weights and moments have them: a kernel's speed is bytes of input by CPU time, a decoder's
bytes of output by CPU time, each with everything in host memory; beside them a plain copy of the same bytes, in the
same turns.
Then the whole way of a layer (a block of a Llama, weights and AdamW's moments, 12 bytes a parameter): what the capture
thread does, with what codes are relative to read back from the file where an exact save wrote it. One torch thread.

    python benchmarks/bench_codecs.py [million elements] [repeats]
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import publish
from models import llama_of_35_layers
from turns import spread, take_turns

import llmtailor
from llmtailor.codecs import Rest, StoredCodes, parse_rest
from llmtailor.codecs.decoding import decode_tensor
from llmtailor.codecs.encoding import KERNELS
from llmtailor.codecs.kernels import Kernels
from llmtailor.live_state import LiveReader
from llmtailor.storage import FileReader
from llmtailor.tensors import TensorMeta
from llmtailor.writer import CodedImage, code_layer
from llmtailor.writer.base_file import BaseFile, BaseLayer
from llmtailor.writer.coding import LayerEncoder
from llmtailor.writer.devices import Lanes

RESTS = ("q8", "q4", "compact", "compact4")
HOST = torch.device("cpu")


def secs_of(call: Callable[[], object]) -> float:
    """CPU time of this thread: what a core is busy for, whatever else runs beside it."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def make_values(codec: str, numel: int, device: torch.device = HOST) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Numbers as a training has them, and what they are relative to."""
    generator = torch.Generator(device).manual_seed(0)
    normal = functools.partial(torch.randn, numel, generator=generator, device=device)
    values = normal() * 0.02
    if codec.startswith("log"):
        return values * values * 1e-4, None
    return values, values + normal() * 1e-4 if codec.startswith("delta") else None


def strips(tensor: torch.Tensor | None, numel: int, total: int) -> list[Any]:
    return [None if tensor is None else tensor[start : start + numel] for start in range(0, total, numel)]


def measure_kernels(numel: int, repeats: int) -> dict[str, Any]:
    """Rows: every codec, fused and as the reference, to codes and back."""
    kernels = Kernels()
    compile_secs = secs_of(lambda: kernels.compile([(codec, torch.float32, HOST) for codec in KERNELS], 2**31))
    fused_strip = kernels.strip_numel(HOST)
    reference_strip = Kernels().strip_numel(HOST)
    target = torch.empty(numel)
    turns: dict[str, Callable[[], float]] = {}
    source, _ = make_values("int8", numel)
    pieces = list(zip(strips(source, fused_strip, numel), strips(target, fused_strip, numel), strict=True))
    turns["copy"] = lambda: secs_of(lambda: [np.copyto(into.numpy(), each.numpy()) for each, into in pieces])
    for codec in KERNELS:
        values, base = make_values(codec, numel)
        for name, strip, find in (
            ("encode", fused_strip, kernels.get),
            ("encode_reference", reference_strip, lambda codec, values: KERNELS[codec]),
        ):
            pairs = list(zip(strips(values, strip, numel), strips(base, strip, numel), strict=True))
            turns[f"{codec}_{name}"] = lambda codec=codec, pairs=pairs, find=find: secs_of(  # type: ignore[misc]
                lambda: [find(codec, each)(each, of_base) for each, of_base in pairs]
            )
        turns[f"{codec}_decode"] = decode_turn(codec, values, base, target)
    with torch.no_grad():
        for turn in turns.values():
            turn()
        samples = take_turns(turns, repeats)
    nbytes = numel * 4
    rates = {name: [nbytes / 1e9 / each for each in secs] for name, secs in samples.items()}
    rows = {name: spread(name, each, unit="gb_per_sec", digits=2) for name, each in rates.items()}
    return {
        "are_fused": kernels.are_fused,
        "compile_secs": round(compile_secs, 1),
        **{key: value for row in rows.values() for key, value in row.items()},
    }


def decode_turn(
    codec: str, values: torch.Tensor, base: torch.Tensor | None, target: torch.Tensor
) -> Callable[[], float]:
    stored = StoredCodes(codec=codec, meta=TensorMeta(dtype="F32", shape=tuple(values.shape)))
    with torch.no_grad():
        *found, _ = KERNELS[codec](values, base)
    arrays = {
        name: memoryview(array.view(torch.uint8).numpy().data).cast("B")
        for name, array in zip(stored.arrays, found, strict=True)
    }
    relative = None if base is None else base.numpy()
    if stored.base == "rounded":
        relative = values.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(-1)
    out = memoryview(target.view(torch.uint8).numpy().data).cast("B")
    return lambda: secs_of(lambda: decode_tensor(stored, arrays, relative, out))


class LayerWay:
    """A layer from live tensors to codes in host memory."""

    def __init__(self, image: CodedImage, encoder: LayerEncoder, checkpoint: llmtailor.Checkpoint) -> None:
        self.nbytes = image.live.nbytes
        self._image = image
        self._encoder = encoder
        self._checkpoint = checkpoint
        self._record = next(each for each in checkpoint.manifest.layers if each.name == image.layer)

    def encode(self) -> None:
        with contextlib.ExitStack() as stack:
            base = None
            if self._image.base == "exact":
                file = BaseFile(self._checkpoint.path, self._record.weights, FileReader())
                base = BaseLayer(stack.enter_context(file))
            assert self._encoder.encode(self._image, base, lambda: None) is not None


def layer_ways(
    directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, lanes: Lanes
) -> dict[str, LayerWay]:
    """A block of a Llama, for every policy; kernels are compiled, and an exact save is there to be relative to."""
    with llmtailor.Run(directory / "run", model, optimizer) as run:
        checkpoint = llmtailor.open_checkpoint(run.save(1).result())
    move(model, optimizer)
    live = LiveReader().read(model, [optimizer])
    ways: dict[str, LayerWay] = {}
    for name in RESTS:
        rest = parse_rest(name)
        assert isinstance(rest, Rest)
        coded = code_layer(live.images["layers.1"], rest)
        assert coded is not None
        encoder = LayerEncoder(lanes)
        every = [code_layer(each, rest) for each in live.images.values()]
        encoder.compile([each for each in every if each is not None])
        ways[name] = LayerWay(coded, encoder, checkpoint)
        ways[name].encode()
    return ways


def measure_layers(repeats: int) -> dict[str, Any]:
    """Rows: a block the whole way, for every policy."""
    model, optimizer = llama_of_35_layers(768, vocab_size=512)
    with tempfile.TemporaryDirectory() as directory:
        ways = layer_ways(Path(directory), model, optimizer, Lanes())
        samples = take_turns({name: functools.partial(secs_of, way.encode) for name, way in ways.items()}, repeats)
    rows: dict[str, Any] = {"layer_bytes": ways["q8"].nbytes}
    for name, secs in samples.items():
        rows |= spread(f"layer_{name}", [ways[name].nbytes / 1e9 / each for each in secs], unit="gb_per_sec", digits=2)
    return rows


def move(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step, so that differences are not zero."""
    tokens = torch.randint(0, 512, (1, 8), device=next(model.parameters()).device)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def main() -> None:
    millions, repeats = [int(text) for text in sys.argv[1:]] + [16, 7][len(sys.argv) - 1 :]
    torch.set_num_threads(1)
    numel = millions * 2**20
    rows = {"elements": numel, "repeats": repeats, **measure_kernels(numel, repeats), **measure_layers(repeats)}
    combined = {
        name: round(3 / sum(1 / rows[f"{codec}_{way}_gb_per_sec_median"] for codec in codecs), 2)
        for way in ("encode", "encode_reference", "decode")
        for name, codecs in (
            (f"q8_{way}_gb_per_sec", ("delta8", "int8", "log8")),
            (f"q4_{way}_gb_per_sec", ("delta4", "int4", "log4")),
            (f"compact_{way}_gb_per_sec", ("tail8", "int8", "log8")),
            (f"compact4_{way}_gb_per_sec", ("tail4", "int4", "log4")),
        )
    }
    shares = {
        f"{codec}_{way}_share_of_copy": round(
            statistics.median([rows[f"{codec}_{way}_gb_per_sec_median"] / rows["copy_gb_per_sec_median"]]), 3
        )
        for codec in KERNELS
        for way in ("encode", "decode")
    }
    publish("codecs", {**rows, **combined, **shares})


if __name__ == "__main__":
    main()
