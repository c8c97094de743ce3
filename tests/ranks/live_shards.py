"""What real ranks would write of their state, as a program of its own: one process per rank, over gloo.

python live_shards.py DIRECTORY CASE...   of each: trains a little, writes <case>/rank-<n>/ with the files of this rank
                                          and ``live.json``; rank 0 also ``whole.safetensors``, gathered by torch

On the way each rank checks what needs no other: that saves notice changes, that reading again costs nothing, that
state goes back into an optimizer. A case is ``<how it is spread>-<optimizer>``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from llmtailor.errors import IncompatibleError, UnsupportedError
from llmtailor.live_state import LiveLayers, LiveReader
from llmtailor.local_parts import Seat, describe_cut, local_part, memory_of
from llmtailor.model_state import read_model
from llmtailor.optimizer_check import check_state
from llmtailor.optimizer_state import (
    load_parameter_state,
    new_state_tensor,
    optimizer_class,
    parameter_names,
    read_groups,
    read_state,
)
from llmtailor.state_keys import state_key
from llmtailor.tensor_bytes import meta_of
from llmtailor.tensors import TensorMeta
from llmtailor.writer.images import FileImage
from llmtailor.writer.watch import watch

# Odd, so that shards are uneven; even where torch demands it. A quarter of a matrix is more than is copied at once.
WIDTH, INNER = 87, 94
SPREADS: dict[str, Callable[[nn.Module], None]] = {}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True),
    "plain": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False, amsgrad=True),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("seen", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(101, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.score = nn.Linear(WIDTH, 3)
        self.lm_head = nn.Linear(WIDTH, 101, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.norm.empty = nn.Parameter(torch.empty(0, 2))
        self.layers[1].norm.bias.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        return self.lm_head(x).sum() + self.score(x).square().sum()


def spread(how: str) -> Callable[[Callable[[Model], None]], Callable[[Model], None]]:
    def register(function: Callable[[Model], None]) -> Callable[[Model], None]:
        SPREADS[how] = function
        return function

    return register


def shard(model: Model, mesh: DeviceMesh) -> None:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    # The root stays gathered after a forward, as it does by default.
    fully_shard(model, mesh=mesh, ignored_params={model.norm.empty})


def cut_by_columns_and_rows(model: Model, mesh: DeviceMesh) -> None:
    for layer in model.layers:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def mesh_of(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[: len(shape)])


@spread("ddp")
def spread_ddp(model: Model) -> None:
    del model


@spread("fsdp")
def spread_fsdp(model: Model) -> None:
    mesh = mesh_of(dist.get_world_size())
    shard(model, mesh)
    model.norm.empty = nn.Parameter(distribute_tensor(model.norm.empty.detach(), mesh, [Shard(1)]))


@spread("fsdp_alone")
def spread_fsdp_alone(model: Model) -> None:
    """Each rank is a mesh of its own, so nothing is spread."""
    shard(model, mesh_of(dist.get_world_size(), 1)["tp"])


@spread("tp")
def spread_tp(model: Model) -> None:
    cut_by_columns_and_rows(model, mesh_of(dist.get_world_size()))


@spread("ddp_tp")
def spread_ddp_tp(model: Model) -> None:
    cut_by_columns_and_rows(model, mesh_of(2, 2)["tp"])


@spread("fsdp_tp")
def spread_fsdp_tp(model: Model) -> None:
    mesh = mesh_of(2, 2)
    cut_by_columns_and_rows(model, mesh["tp"])
    shard(model, mesh["dp"])


@spread("hsdp")
def spread_hsdp(model: Model) -> None:
    shard(model, mesh_of(2, 2))


def build(case: str) -> tuple[Model, torch.optim.Optimizer]:
    how, optimizer = case.split("-")[:2]
    torch.manual_seed(3)
    model = Model()
    SPREADS[how](model)
    return model, OPTIMIZERS[optimizer](model)


def compute_gradients(model: Model, seed: int) -> None:
    model(torch.randint(0, 101, (2, 5), generator=torch.Generator().manual_seed(seed))).backward()


def train_step(model: Model, optimizer: torch.optim.Optimizer, seed: int) -> None:
    compute_gradients(model, seed)
    optimizer.step()
    optimizer.zero_grad()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def gather(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The whole state by name in a file, gathered by torch."""
    found = {name: whole(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for name, parameter in model.named_parameters():
        for leaf, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                found[state_key(name, leaf)] = whole(value if isinstance(value, torch.Tensor) else torch.tensor(value))
    return found


def content(file: FileImage) -> bytes:
    parts = [
        part if isinstance(part, memoryview) else part.contiguous().flatten().view(torch.uint8) for part in file.parts
    ]
    return b"".join(bytes(part) if isinstance(part, memoryview) else part.numpy().tobytes() for part in parts)


def contents(live: LiveLayers, *, is_held: bool = False) -> dict[str, bytes]:
    images = [image.hold() if is_held else image for image in live.images.values()]
    return {file.name: content(file) for image in images for file in image.files}


def new_reader(case: str) -> LiveReader:
    return LiveReader(seat=Seat(rank=dist.get_rank(), size=dist.get_world_size(), spread=case.endswith("-spread")))


def check_reading_again(case: str, reader: LiveReader, model: Model, optimizer: torch.optim.Optimizer) -> None:
    first = reader.read(model, [optimizer])
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64))  # FSDP2 leaves the root gathered
    again = reader.read(model, [optimizer])
    assert planned_anew(again, first) == set()
    assert (again.layout, again.nbytes) == (first.layout, first.nbytes)
    assert contents(again) == contents(first)
    parameter = model.layers[0].up.weight
    leaf = next(leaf for leaf, value in optimizer.state[parameter].items() if value is not None and value.ndim)
    optimizer.state[parameter][leaf] = optimizer.state[parameter][leaf].clone()
    moved = reader.read(model, [optimizer])
    assert planned_anew(moved, first) == set()
    assert contents(moved) == contents(first)
    values = [each for state in optimizer.state.values() for each in state.values() if isinstance(each, torch.Tensor)]
    live = {memory_of(each).data_ptr() for each in values}
    files = [image.optimizer for image in moved.images.values() if image.optimizer is not None]
    assert all(memory_of(each).data_ptr() in live for file in files for each in file.tensors if each.ndim)
    check_exchanged_memory(case, reader, model, optimizer, optimizer.state[parameter][leaf])


def planned_anew(live: LiveLayers, before: LiveLayers) -> set[str]:
    """Layers whose files were not laid out before."""
    return {
        name
        for name, image in live.images.items()
        for now, then in zip(image.files, before.images[name].files, strict=True)
        if now.layout is not then.layout
    }


def check_exchanged_memory(
    case: str, reader: LiveReader, model: Model, optimizer: torch.optim.Optimizer, state: torch.Tensor
) -> None:
    """The same objects in other memory: that is what is read."""
    before = contents(reader.read(model, [optimizer]))
    model.layers[0]._apply(lambda tensor: tensor * 2)  # as ``model.to`` does
    if isinstance(state, DTensor):
        state._local_tensor = state._local_tensor * 2
    else:
        state.data = state.data * 2
    after = contents(reader.read(model, [optimizer]))
    assert after == contents(new_reader(case).read(model, [optimizer]))
    assert {name for name in after if after[name] != before[name]} == {name for name in after if "layers.000" in name}


def check_lazy_capture(live: LiveLayers, model: Model, optimizer: torch.optim.Optimizer) -> None:
    """What is copied while forward and backward run is the state of the moment of the save."""
    held = [file for image in live.images.values() for file in image.hold().files]
    truth = {file.name: content(file) for file in held}
    watches = [watch(*each) for file in held for each in file.referred]
    assert all(not isinstance(each.tensor, DTensor) for each in watches)
    if held and dist.get_rank() == 0:
        names = [stored.name for file in held for stored in file.layout.tensors]
        lazy = [each for file in held for each in file.are_lazy]
        assert {name for name, is_lazy in zip(names, lazy, strict=True) if not is_lazy} <= {
            f"layers.{index}.seen" for index in range(2)
        }
        assert watches
    compute_gradients(model, 77)
    assert not any(each.has_changed() for each in watches)
    assert {file.name: content(file) for file in held} == truth
    # That changes no byte, so the sample says nothing: only what counts changes of the parts does.
    written = [model.embed_tokens.weight, *optimizer.state[model.layers[0].up.weight].values()]
    parts = [local_part(tensor).tensor for tensor in written if tensor is not None]
    with torch.no_grad():
        for part in parts:
            part.mul_(1)
    addresses = {part.data_ptr() for part in parts} & {each.address for each in watches}
    assert {each.address for each in watches if each.has_changed()} == addresses
    assert addresses or dist.get_rank()
    optimizer.step()
    optimizer.zero_grad()
    assert all(each.has_changed() for each in watches)


def check_counting(reader: LiveReader, model: Model, optimizer: torch.optim.Optimizer) -> None:
    """An operation on the whole is noticed, though it changes no byte and not the counter of the part."""
    images = reader.read(model, [optimizer]).images.values()
    watches = [watch(*each) for image in images for file in image.hold().files for each in file.referred]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1)
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, torch.Tensor):
                    value.mul_(1)
    assert all(each.has_changed() for each in watches)


def check_loading(case: str, model: Model, optimizer: torch.optim.Optimizer) -> None:
    """State goes into the optimizer of a fresh model, from wholes, from parts, and into memory that was filled."""
    states = read_state(optimizer, parameter_names(model.named_parameters()))
    full = {fqn: {leaf: whole(value) for leaf, value in each.tensors.items()} for fqn, each in states.items()}
    notes = {fqn: each.notes for fqn, each in states.items()}
    for way in ("wholes", "parts", "placed"):
        fresh, target = build(case)
        names = parameter_names(fresh.named_parameters())
        metas = {fqn: {leaf: meta_of(value) for leaf, value in each.tensors.items()} for fqn, each in states.items()}
        check_state(target, names, metas, read_groups(optimizer, names_of(model)), optimizer_class(target), notes=notes)
        for parameter, fqn in names.items():
            tensors = full[fqn] if way == "wholes" else dict(states[fqn].tensors)
            if way == "placed":
                tensors = {leaf: place(target, parameter, leaf, value) for leaf, value in tensors.items()}
            load_parameter_state(target, parameter, fqn, tensors, notes[fqn], is_placed=way == "placed")
            for leaf, value in optimizer.state.get(dict(model.named_parameters())[fqn], {}).items():
                found = target.state[parameter][leaf]
                assert type(found) is type(value), (fqn, leaf, found, value)
                if isinstance(value, torch.Tensor):
                    assert describe_cut(found) == describe_cut(value), (fqn, leaf)
                    assert torch.equal(local_part(found).tensor, local_part(value).tensor), (fqn, leaf)
        load_weights(fresh, model)
        train_step(fresh, target, 5)
        check_state(target, names, metas, read_groups(optimizer, names_of(model)), optimizer_class(target), notes=notes)
    train_step(model, optimizer, 5)
    after = gather(model, optimizer)
    assert all(torch.equal(value, after[name]) for name, value in gather(fresh, target).items())
    wrong = {**metas, "norm.weight": {leaf: TensorMeta(dtype="F32", shape=(7,)) for leaf in metas["norm.weight"]}}
    try:
        check_state(target, names, wrong, read_groups(optimizer, names_of(model)), optimizer_class(target), notes=notes)
    except IncompatibleError:
        return
    raise AssertionError("state of other shapes was not refused")


def names_of(model: Model) -> dict[torch.Tensor, str]:
    return parameter_names(model.named_parameters())


def place(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, leaf: str, value: torch.Tensor) -> torch.Tensor:
    made = new_state_tensor(optimizer, parameter, leaf, value.shape, value.dtype)
    assert local_part(made).shard == local_part(value).shard
    local_part(made).tensor.copy_(local_part(value).tensor)
    return made


def load_weights(target: Model, source: Model) -> None:
    with torch.no_grad():
        pairs = zip([*target.parameters(), *target.buffers()], [*source.parameters(), *source.buffers()], strict=True)
        for one, other in pairs:
            local_part(one).tensor.copy_(local_part(other).tensor)


def write(directory: Path, case: str, reader: LiveReader, model: Model, optimizer: torch.optim.Optimizer) -> None:
    live = reader.read(model, [optimizer])
    found = contents(live)
    assert found == contents(live, is_held=True)
    own = directory / case / f"rank-{dist.get_rank()}"
    for name, data in found.items():
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_bytes(data)
    told = {
        "nbytes": dict(live.nbytes),
        "layout": live.layout,
        "layers": [layer.name for layer in live.layers],
        "files": {name: [file.name for file in image.files] for name, image in live.images.items()},
        "ranks": {file.name: file.rank for image in live.images.values() for file in image.files},
        "updates": {name: image.count_updates() for name, image in live.images.items()},
        "masters": {name: dict(image.masters) for name, image in live.images.items()},
        "shapes": {record.fqn: [record.dtype, record.shape, record.layer] for record in live.tensors},
    }
    own.mkdir(parents=True, exist_ok=True)
    (own / "live.json").write_text(json.dumps(told))
    state = gather(model, optimizer)
    state.pop("lm_head.weight", None)
    if dist.get_rank() == 0:
        save_file(state, directory / case / "whole.safetensors")


def run_case(directory: Path, case: str) -> None:
    model, optimizer = build(case)
    reader = new_reader(case)
    for seed in range(2):
        train_step(model, optimizer, seed)
    optimizer.state[model.layers[0].up.weight]["count"] = torch.tensor(3)
    check_reading_again(case, reader, model, optimizer)
    check_lazy_capture(reader.read(model, [optimizer]), model, optimizer)
    check_counting(reader, model, optimizer)
    optimizer.state[model.layers[0].up.weight]["count"] = 4  # a number, which leaves a note
    write(directory, case, reader, model, optimizer)
    check_loading(case, model, optimizer)


def check_refusals() -> None:
    """What cannot be saved is refused by name."""
    mesh = mesh_of(dist.get_world_size())
    summed = nn.Module()
    summed.weight = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    wrapped = FullyShardedDataParallel(nn.Linear(8, 8), use_orig_params=True, device_id=torch.device("cpu"))
    assert refusal_of(lambda: local_part(summed.weight)) == "tensor-kind"
    assert refusal_of(lambda: read_model(wrapped)) == "fsdp1"


def refusal_of(action: Callable[[], object]) -> str:
    try:
        action()
    except UnsupportedError as err:
        return err.kind
    return "nothing was refused"


def main() -> None:
    directory, *cases = sys.argv[1:]
    dist.init_process_group("gloo")
    try:
        check_refusals()
        for case in cases:
            try:
                run_case(Path(directory), case)
            except BaseException as err:
                err.add_note(f"in case {case}, on rank {dist.get_rank()}")
                raise
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
