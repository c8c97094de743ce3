"""Real trainings with transformers' Trainer on several gloo ranks: DDP and FSDP2. One process per rank.

python trainer_trainings.py begin DIRECTORY CASE...     trains each case to the end; again with our saves, to STOP; dies
python trainer_trainings.py resume DIRECTORY CASE...    resumes each and trains to the end
python trainer_trainings.py reshard DIRECTORY CASE...   the same on another number of ranks

A case is ``<framework>-<strategy>-<dtype>``. Rank 0 writes digests of the gathered state, by name, as JSON.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from llmtailor.integrations.transformers import tailor
from ranks.loop_trainings import digests, report, whole
from tiny_models import build_llama, build_trainer, losses

STEPS = 6
STOP = 5


class Truth(TrainerCallback):
    """Digests of the state after each step that is saved."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.by_step: dict[int, dict[str, str]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (2, 4):
            self.by_step[state.global_step] = digests(gather(self.trainer))


class Loaded(TrainerCallback):
    """Digests of the state that training begins with."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.digests: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.digests = digests(gather(self.trainer))


def gather(trainer: Any) -> dict[str, torch.Tensor]:
    """The whole state by name, on every rank."""
    if trainer.is_deepspeed_enabled:
        from llmtailor.zero import read_zero
        from ranks.zero_states import assemble

        state = read_zero(trainer.model_wrapped)
        own = {name: (part.tensor.detach().clone(), part.shard) for name, part in state.parts.items()}
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, own)
        return assemble(state.metas, everywhere)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in [*trainer.model.named_parameters(), *trainer.model.named_buffers()]:
        found[name] = whole(tensor)
        for leaf, value in sorted(optimizer.state.get(tensor, {}).items()):
            found[f"state.{name}.{leaf}"] = whole(value)
    return found


def build(directory: Path, case: str, *, stop: int | None = None, callback: Any = None, **options: Any) -> Trainer:
    framework, _, dtype = case.split("-")[:3]
    if framework == "fsdp":
        options |= {
            "fsdp": True,
            "fsdp_config": {
                "version": 2,
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                "state_dict_type": "SHARDED_STATE_DICT",
            },
        }
    if framework.startswith("zero"):
        options |= {"deepspeed": zero_config(int(framework[-1]), dtype)}
    trainer = build_trainer(
        directory,
        model=build_llama(num_layers=3, tied="tied" in case),
        stop=stop,
        callbacks=[] if callback is None else [callback],
        **({"max_steps": STEPS, "save_steps": 2, "bf16": dtype == "bf16", "optim": "adamw_torch"} | options),
    )
    if callback is not None:
        callback.trainer = trainer
    return trainer


def zero_config(stage: int, dtype: str) -> dict[str, Any]:
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # Or the next case would train at the stage of the first, and its model begin with other numbers at stage 3.
    AcceleratorState._reset_state(True)
    unset_hf_deepspeed_config()
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bf16"},
        "steps_per_print": 10**9,
    }


def tailored(directory: Path, case: str, **options: Any) -> Trainer:
    return tailor(build(directory, case, **options), strategy=case.split("-")[1], commit_timeout_secs=60)


def begin(directory: Path, case: str) -> None:
    truth = Truth()
    straight = build(directory / f"{case}.stock", case, callback=truth, save_strategy="no")
    straight.train()
    report(directory / f"{case}.straight.json", {"losses": losses(straight), "final": digests(gather(straight))})
    report(directory / f"{case}.truth.json", truth.by_step)
    tailored(directory / case, case, stop=STOP).train()


def resume(directory: Path, case: str, name: str) -> None:
    loaded = Loaded()
    trainer = tailored(directory / case, case, callback=loaded)
    trainer.train(resume_from_checkpoint=True)
    told = {"loaded": loaded.digests, "losses": losses(trainer), "final": digests(gather(trainer))}
    report(directory / f"{case}.{name}.json", told)


def shard_on_cpu() -> None:
    """Have accelerate shard on CPUs; it silently falls back to DDP there. Source: accelerate 1.15, state.py."""
    import accelerate.state as accelerate_state

    stock = accelerate_state.AcceleratorState.__init__

    def patched(self: Any, *args: Any, **options: Any) -> None:
        stock(self, *args, **options)
        multi_cpu, fsdp = accelerate_state.DistributedType.MULTI_CPU, accelerate_state.DistributedType.FSDP
        shared = accelerate_state.PartialState._shared_state
        plugin = options.get("fsdp_plugin")
        if shared.get("distributed_type") == multi_cpu and plugin is not None:
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin
            self.distributed_type = shared["distributed_type"] = fsdp

    accelerate_state.AcceleratorState.__init__ = patched  # type: ignore[method-assign]


def main() -> None:
    verb, directory, cases = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    if any(case.startswith("fsdp") for case in cases):
        shard_on_cpu()
    if any(case.startswith("zero") for case in cases):
        import deepspeed
        import deepspeed.comm.torch

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # it would be compiled, see merge/
        deepspeed.init_distributed(dist_backend="gloo")
    else:
        dist.init_process_group("gloo")
    for case in cases:
        if verb == "begin":
            begin(directory, case)
        else:
            resume(directory, case, "resumed" if verb == "resume" else f"resharded-{dist.get_world_size()}")
    dist.barrier()
    if verb == "begin":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
