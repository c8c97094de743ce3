"""Trainings of real DeepSpeed engines that are read, and resumed from whole tensors in memory; run by ``run_jobs``.

zero_states.py jobs.json, on each rank
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

START, END = 3, 6
"""Steps at which a training is read, and at which it ends."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training from the start to the end, or from what was read of another to the end."""

    out: str
    stage: int
    dtype: str = "bf16"
    """bf16, fp16 or fp32."""
    source: str | None = None
    """``out`` of the job to resume from."""
    is_used: bool = False
    """The engine that is resumed into has trained before."""
    layer_groups: bool = False
    """A group for each layer instead of one for all."""
    optimizer: str = "adamw"
    """Or ``sgd``, or ``config``."""
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def file(self, name: str) -> Path:
        """What was read: ``start`` (at ``START``) or ``end``; see ``_dump``."""
        return Path(f"{self.out}-{name}.pt")

    @property
    def stock(self) -> Path:
        """What DeepSpeed saved at ``START``, where its functions are wrong."""
        return Path(f"{self.out}-stock")

    @property
    def files(self) -> Path:
        """The files that each rank would have written for a checkpoint, in a directory of its own."""
        return Path(f"{self.out}-files")


def run_jobs(jobs: Sequence[Job], *, ranks: int, scratch: Path, timeout_secs: float = 280) -> None:
    """Run jobs one after the other in one launch; raises with the end of their output if one fails."""
    from ranks.launch import run_ranks  # which the program itself does without

    file = scratch / f"jobs-{ranks}-{len(list(scratch.glob('jobs-*')))}.json"
    file.write_text(json.dumps([asdict(job) for job in jobs]))
    run_ranks(Path(__file__), ranks, file, timeout_secs=timeout_secs)


def assemble(metas: Mapping[str, Any], parts: Sequence[Mapping[str, tuple[Any, Any]]]) -> dict[str, Any]:
    """Whole tensors from what the ranks have; raises if their parts of one do not tile it."""
    import torch

    from llmtailor.shards import do_shards_tile, find_overlaps, whole_shard
    from llmtailor.tensor_bytes import torch_dtype

    wholes = {}
    for name, meta in metas.items():
        held = [each[name] for each in parts if name in each]
        if all(shard == whole_shard(meta.shape) for _, shard in held):
            assert all(torch.equal(tensor, held[0][0]) for tensor, _ in held), name
            held = held[:1]
        assert held, f"no rank has {name}"
        assert do_shards_tile([shard for _, shard in held]), (name, [shard for _, shard in held])
        whole = wholes[name] = torch.empty(meta.shape, dtype=torch_dtype(meta.dtype))
        for tensor, shard in held:
            assert tuple(tensor.shape) == shard.sizes, name
            for overlap in find_overlaps(shard, whole_shard(meta.shape)):
                view(whole, overlap.target).copy_(view(tensor, overlap.source))
    return wholes


def view(tensor: Any, at: Any) -> Any:
    """See ``shards.View``."""
    length = 1
    for size in at.sizes:
        length *= size
    return tensor.reshape(-1)[at.start : at.start + length].view(at.sizes)[at.slices]


def _main() -> None:
    import deepspeed
    import deepspeed.comm.torch
    import torch

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # it would be compiled, see merge/
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    for each in json.loads(Path(sys.argv[1]).read_text()):
        job = Job(**each)
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
        _run(job)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _run(job: Job) -> None:
    import torch

    engine = _build_engine(job, seed=0 if job.source is None else 7)
    losses = []
    if job.source is None:
        losses += [_step(engine, step) for step in range(START)]
    else:
        if job.is_used:
            _step(engine, END)
        _resume(engine, Path(f"{job.source}-start.pt"))
    _dump(engine, job, "start", [])
    _write_files(engine, job.files / str(torch.distributed.get_rank()))
    if job.source is None and job.zero.get("round_robin_gradients"):
        engine.save_checkpoint(str(job.stock), tag="stock")
    losses += [_step(engine, step) for step in range(START, END)]
    _dump(engine, job, "end", losses[-(END - START) :])


def _resume(engine: Any, path: Path) -> None:
    import torch

    from llmtailor.shards import find_overlaps, whole_shard
    from llmtailor.zero import ZeroFilling, load_groups, load_rest

    saved = torch.load(path, weights_only=False)
    load_groups(engine, saved["groups"])
    filling = ZeroFilling(engine, saved["metas"], saved["notes"])
    for name, targets in filling.targets.items():
        for target in targets:
            for overlap in find_overlaps(whole_shard(saved["metas"][name].shape), target.shard):
                view(target.tensor, overlap.target).copy_(view(saved["tensors"][name], overlap.source))
    filling.finish()
    load_rest(engine, saved["rest"])


def _write_files(engine: Any, directory: Path) -> None:
    import torch

    from llmtailor.local_parts import Seat
    from llmtailor.zero import ZeroReader

    seat = Seat(rank=torch.distributed.get_rank(), size=torch.distributed.get_world_size(), spread=True)
    live = ZeroReader(engine, seat=seat).read(engine.module, [engine.optimizer])
    (directory / "optimizer").mkdir(parents=True)
    for image in live.images.values():
        for file in image.hold().files:
            parts = [part if isinstance(part, memoryview) else _bytes(part) for part in file.parts]
            (directory / file.name).write_bytes(b"".join(parts))
    facts = {
        "tensors": [record.model_dump(mode="json") for record in live.tensors],
        "optimizers": [record.model_dump(mode="json") for record in live.optimizers],
        "layers": {layer.name: list(layer.fqns) for layer in live.layers},
        "nbytes": live.nbytes,
        "layout": live.layout,
    }
    (directory / "facts.json").write_text(json.dumps(facts))


def _bytes(tensor: Any) -> bytes:
    import torch

    flat: bytes = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return flat


def _full(engine: Any, job: Job) -> dict[str, Any]:
    """Masters and moments as DeepSpeed's own functions give them; they are wrong with round-robin gradients."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    zero = engine.optimizer
    if job.zero.get("round_robin_gradients"):
        return {}
    if job.source is None and hasattr(zero, "_hp_optimizer_states_linked"):
        # In a training from the start DeepSpeed links the states of its first group only; in a resumed one we do.
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    kinds = [set(state) for state in zero.optimizer.state.values()]
    leaves = sorted(set.intersection(*kinds) - {"step"})
    full = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            full[f"state.{name}.master"] = safe_get_full_fp32_param(parameter).clone()
            full |= {f"state.{name}.{leaf}": safe_get_full_optimizer_state(parameter, leaf).clone() for leaf in leaves}
    return full


def _dump(engine: Any, job: Job, when: str, losses: list[float]) -> None:
    """On rank 0 whole tensors, all else that was read, and what DeepSpeed itself says of the same."""
    import deepspeed
    import torch

    from llmtailor.zero import read_rest, read_zero

    state = read_zero(engine)
    own = {name: (part.tensor.detach().clone(), part.shard) for name, part in state.parts.items()}
    full = _full(engine, job)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    everywhere: list[Any] = [None] * ranks
    facts = (state.weights, state.states, state.spread, state.groups, state.layout)
    torch.distributed.all_gather_object(everywhere, (own, state.notes, facts))
    assert all(each[2] == facts for each in everywhere), "ranks differ in what must be the same"
    live = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            live[name] = parameter.detach().clone()
    if rank == 0:
        content = {
            "tensors": assemble(state.metas, [each[0] for each in everywhere]),
            "notes": {name: note for each in everywhere for name, note in each[1].items()},
            "parts": [{name: shard for name, (_, shard) in each[0].items()} for each in everywhere],
            "metas": state.metas,
            "groups": state.groups,
            "layout": state.layout,
            "rest": read_rest(engine),
            "live": live,
            "full": full,
            "losses": losses,
        }
        torch.save(content, job.file(when))
    torch.distributed.barrier()


def _step(engine: Any, step: int) -> float:
    import torch

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tokens = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(step * ranks + rank))
    loss = engine(tokens)
    engine.backward(loss)
    engine.step()
    return float(loss)


def _build_model(seed: int) -> Any:
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(7, 13)
            self.down = nn.Linear(13, 7)
            self.norm = nn.LayerNorm(7)
            self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
            self.register_buffer("scale", torch.rand(3))

        def forward(self, hidden: Any) -> Any:
            return hidden + self.norm(self.down(self.up(hidden).relu())) * self.frozen * self.scale.sum()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(11, 7)
            self.layers = nn.ModuleList([Block(), Block()])
            self.lm_head = nn.Linear(7, 11, bias=False)
            self.lm_head.weight = self.embed_tokens.weight
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, tokens: Any) -> Any:
            hidden = self.embed_tokens(tokens)
            for block in self.layers:
                hidden = block(hidden)
            logits = self.lm_head(hidden).float() + self.bias
            return nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 11), tokens[:, 1:].reshape(-1))

    torch.manual_seed(seed)
    return Model()


def _build_engine(job: Job, *, seed: int) -> Any:
    import deepspeed
    import torch

    model = _build_model(seed)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": [parameter for _, parameter in trained], "weight_decay": 0.1}]
    if job.layer_groups:
        places: dict[str, list[Any]] = {}
        for name, parameter in trained:
            places.setdefault(".".join(name.split(".")[:2]), []).append(parameter)
        groups = [{"params": each, "weight_decay": 0.1 * index} for index, each in enumerate(places.values())]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": job.stage, **job.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 9}},
        **job.config,
    }
    if job.dtype == "bf16":
        config["bf16"] = {"enabled": True, **config.get("bf16", {})}
    if job.dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}
    optimizer = None
    if job.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
    elif job.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
    parameters = None if optimizer is not None else [parameter for _, parameter in trained]
    return deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=parameters, config=config)[0]


if __name__ == "__main__":
    _main()
