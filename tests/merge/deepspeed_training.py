"""Real trainings with the HF Trainer or a plain engine under DeepSpeed, on CPU over gloo; run by ``run_trainings``.

    deepspeed_training.py jobs.json, on each rank

One launch does many trainings after each other: importing the libraries takes longer than any of them.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VOCABULARY = 67  # odd, so that partitions do not divide the tensors evenly
_OPTIMIZER_LEAVES = {"exp_avg", "exp_avg_sq", "momentum_buffer"}


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training."""

    out: str
    """Where its checkpoints go; the report is ``<out>.json``."""
    stage: int
    dtype: str = "bf16"
    """bf16, fp16 or fp32."""
    resume: str | None = None
    steps: int = 4
    """Optimizer steps of the whole schedule."""
    stop_at: int | None = None
    save_steps: int = 2
    seed: int = 0
    """Of the model."""
    width: int = 16
    heads: int = 4
    tied: bool = False
    frozen: str | None = None
    """Parameters whose name has this in it are not trained."""
    groups: str = "default"
    """``default`` (decay and no decay) or ``layers`` (2L+3)."""
    optimizer: str = "adamw"
    """Of a plain engine: ``adamw``, ``sgd`` or ``config`` (what ``config`` says)."""
    engine: bool = False
    """A plain engine instead of the HF Trainer."""
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def report(self) -> Path:
        """Losses, where it started, and digests of what the engine held at the start and at the end."""
        return Path(self.out + ".json")

    def truth(self, step: int) -> Path:
        """Digests of what the engine held when it saved at a step."""
        return Path(f"{self.out}-truth-{step}.json")


def run_trainings(trainings: Sequence[Training], *, ranks: int, scratch: Path, timeout_secs: float = 280) -> None:
    """Run trainings in one launch of ``ranks`` processes; raises with the end of their output if one fails."""
    jobs = scratch / f"jobs-{ranks}-{hashlib.sha256(repr(trainings).encode()).hexdigest()[:8]}.json"
    jobs.write_text(json.dumps([asdict(training) for training in trainings]))
    from ranks.launch import run_ranks  # which the program itself does without

    run_ranks(Path(__file__), ranks, jobs, timeout_secs=timeout_secs)


def _main() -> None:
    import deepspeed
    import deepspeed.comm.torch
    import torch

    # The shared-memory extension is compiled on first use, and only makes gloo faster. The attribute of that name in
    # deepspeed.comm is torch itself.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")  # before any model: zero.Init asks it for the world size
    for job in json.loads(Path(sys.argv[1]).read_text()):
        training = Training(**job)
        if training.dtype == "fp16":
            deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
        report = _train_engine(training) if training.engine else _train_trainer(training)
        if torch.distributed.get_rank() == 0:
            training.report.write_text(json.dumps(report, indent=1))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _build_model(training: Training) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(training.seed)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=training.width,
            intermediate_size=training.width * 2 + 5,
            num_hidden_layers=2,
            num_attention_heads=training.heads,
            num_key_value_heads=training.heads // 2,
            max_position_embeddings=64,
            attention_dropout=0.1,
            tie_word_embeddings=training.tied,
        )
    )
    for name, parameter in model.named_parameters():
        if training.frozen is not None and training.frozen in name:
            parameter.requires_grad_(False)
    return model


def _layer_groups(model: Any) -> list[dict[str, Any]]:
    """2L+3 groups: norms of each place first, then the rest of each place."""
    places: dict[tuple[bool, int, str], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            block = re.search(r"\blayers\.(\d+)\.", name)
            place = (int(block[1]), "") if block else (-1, name)
            places.setdefault(("norm" not in name, *place), []).append(parameter)
    return [{"params": places[key], "weight_decay": 0.1 if key[0] else 0.0} for key in sorted(places)]


def _default_groups(model: Any) -> list[dict[str, Any]]:
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [each for name, each in trained if "norm" not in name], "weight_decay": 0.1},
        {"params": [each for name, each in trained if "norm" in name], "weight_decay": 0.0},
    ]


def _samples() -> Any:
    import torch

    return torch.randint(0, VOCABULARY, (96, 12), generator=torch.Generator().manual_seed(0))


def _config(training: Training) -> dict[str, Any]:
    zero = {"stage": training.stage, **training.zero}
    if training.stage == 3:
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
        zero.setdefault("stage3_param_persistence_threshold", 0)
    config = {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **training.config,
    }
    if training.dtype == "bf16":
        config["bf16"] = {"enabled": True, **config.get("bf16", {})}
    if training.dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, **config.get("fp16", {})}
    return config


def _train_engine(training: Training) -> dict[str, Any]:
    import deepspeed
    import torch

    model = _build_model(training)
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, **_config(training)}
    groups = (_layer_groups if training.groups == "layers" else _default_groups)(model)
    optimizer = None
    if training.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
    elif training.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=None if optimizer is not None else [p for p in model.parameters() if p.requires_grad],
        config=config,
    )
    start, loaded = 0, None
    if training.resume is not None:
        found, client = engine.load_checkpoint(training.resume)
        assert found is not None
        start = client["mine"]
        loaded = _digests(engine)
    samples = _samples()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    losses = []
    for step in range(start, training.stop_at or training.steps):
        torch.manual_seed(step * 8 + rank)
        first = 2 * (step * ranks + rank) % len(samples)
        batch = samples[first : first + 2]
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        if (step + 1) % training.save_steps == 0:
            engine.save_checkpoint(training.out, client_state={"mine": step + 1})
            _write_truth(engine, training.truth(step + 1))
    return {"losses": losses, "start": start, "steps": engine.global_steps, "loaded": loaded, "end": _digests(engine)}


def _train_trainer(training: Training) -> dict[str, Any]:
    import torch
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):
        start: int | None = None
        start_lr: Any = None
        start_rng: str = ""
        loaded: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if training.resume is not None:
                self.loaded = _digests(trainer.model_wrapped)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _write_truth(trainer.model_wrapped, training.truth(state.global_step))

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.start is None:
                self.start = state.global_step
                self.start_lr = kwargs["lr_scheduler"].get_last_lr()
                self.start_rng = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == training.stop_at:
                control.should_training_stop = True

    class GroupedTrainer(Trainer):
        def create_optimizer(self, model: Any = None) -> Any:
            if training.groups == "layers" and self.optimizer is None:
                # The Trainer drops an optimizer that is handed to it when DeepSpeed is on.
                self.optimizer = torch.optim.AdamW(_layer_groups(self.model), lr=self.args.learning_rate)
            return super().create_optimizer()

    AcceleratorState._reset_state(True)
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        **_config(training),
    }
    args = TrainingArguments(
        output_dir=training.out,
        max_steps=training.steps,
        per_device_train_batch_size=2,
        save_steps=training.save_steps,
        logging_steps=1,
        learning_rate=1e-2,
        weight_decay=0.1,
        warmup_steps=2,
        report_to=[],
        seed=42,
        bf16=training.dtype == "bf16",
        fp16=training.dtype == "fp16",
        use_cpu=True,
        disable_tqdm=True,
        deepspeed=config,
    )
    samples = [{"input_ids": row, "labels": row.clone()} for row in _samples()]
    watch = Watch()
    trainer = GroupedTrainer(model=_build_model(training), args=args, train_dataset=samples, callbacks=[watch])
    trainer.train(resume_from_checkpoint=training.resume)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "start": watch.start,
        "start_lr": watch.start_lr,
        "start_rng": watch.start_rng,
        "steps": trainer.state.global_step,
        "loaded": watch.loaded,
        "end": _digests(trainer.model_wrapped),
    }


def _write_truth(engine: Any, path: Path) -> None:
    import torch

    truth = _digests(engine)
    if torch.distributed.get_rank() == 0:
        path.write_text(json.dumps(truth, indent=1))
    torch.distributed.barrier()


def _digests(engine: Any) -> dict[str, Any]:
    """What the live engine holds of each parameter, as digests; all ranks must call it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    zero = engine.optimizer
    if hasattr(zero, "_hp_optimizer_states_linked"):
        # In a training from the start DeepSpeed links the states of its first group only.
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    # A collective call for each: a leaf that only some groups have would be asked for by some ranks only.
    kinds = [set(state) for state in zero.optimizer.state.values()]
    leaves = sorted(set.intersection(*kinds) & _OPTIMIZER_LEAVES)
    master, state, weights = {}, {}, {}
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = digest(parameter)
        else:
            weights[name] = digest(parameter)
        if not parameter.requires_grad:
            continue
        master[name] = digest(safe_get_full_fp32_param(parameter))
        state[name] = {}
        for leaf in leaves:
            state[name][leaf] = digest(safe_get_full_optimizer_state(parameter, leaf))
    return {"master": master, "state": state, "weights": weights}


def digest(tensor: Any) -> str:
    """Of the bytes of a tensor, row-major."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()[:32]


if __name__ == "__main__":
    _main()
