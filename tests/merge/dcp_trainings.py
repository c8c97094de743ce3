"""Real FSDP2 trainings on the CPU, as programs of their own: one process per rank, over gloo.

python dcp_trainings.py loop save DIRECTORY        trains 9 steps, writes step-2, step-4 and final.pt
python dcp_trainings.py loop resume CHECKPOINT...  of each: loads it, writes loaded-<ranks>.pt, trains 5 steps, final.pt
python dcp_trainings.py trainer save DIRECTORY     the same with a Trainer: checkpoint-2, checkpoint-4, checkpoint-9
python dcp_trainings.py trainer resume CHECKPOINT...

With one rank the Trainer shards nothing, and saves as it does on a single machine. A directory whose name starts with
"tied" gets a model with tied embeddings; one with "full" in it a Trainer that saves FULL_STATE_DICT. What is compared
is written with ``torch.save`` by rank 0: whole tensors by name, gathered by torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import Dataset

FIRST, SECOND, LAST = 2, 4, 9
VOCABULARY = 64


def run(num_ranks: int, *arguments: object) -> None:
    """Run this file on so many ranks and wait; for the tests.

    Raises:
        AssertionError: A rank failed; carries what all of them printed.
    """
    from ranks.launch import run_ranks  # which the program itself does without

    run_ranks(Path(__file__), num_ranks, *arguments)


class Sentences(Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.tokens = torch.randint(0, VOCABULARY, (96, 12), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index].clone()}


def build_model(*, num_layers: int = 4, tied: bool = False, dropout: float = 0.1, seed: int = 0) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=20,
            intermediate_size=28,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            attention_dropout=dropout,
            tie_word_embeddings=tied,
        )
    )


def write_full_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, states = get_state_dict(model, optimizer, options=options)
    if dist.get_rank() == 0:
        torch.save({"model": weights, "optim": states}, path)


# A loop of one's own


def shard(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for block in model.model.layers:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=1e-2)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    tokens = Sentences().tokens
    for step in range(first, last):
        # The batch of a step is the same for any number of ranks: each takes all of it.
        torch.manual_seed(step)
        batch = tokens[4 * step : 4 * step + 4]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def loop_save(directory: Path) -> None:
    model, optimizer = shard(build_model(tied=directory.name.startswith("tied")))
    step = 0
    for stop in (FIRST, SECOND, LAST):
        train(model, optimizer, step, stop)
        step = stop
        if step != LAST:
            weights, states = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optim": states}, checkpoint_id=directory / f"step-{step}")
    write_full_state(model, optimizer, directory / "final.pt")


def loop_resume(checkpoint: Path) -> None:
    model, optimizer = shard(build_model(tied=checkpoint.name.startswith("tied"), seed=1))
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optim": states}
    dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    write_full_state(model, optimizer, checkpoint / f"loaded-{dist.get_world_size()}.pt")
    train(model, optimizer, SECOND, LAST)
    write_full_state(model, optimizer, checkpoint / "final.pt")


# A Trainer


def let_accelerate_shard_on_the_cpu() -> None:
    """accelerate falls back to DDP where there is no accelerator; its FSDP2 itself runs well there.

    Source: accelerate 1.15.0, state.py (AcceleratorState.__init__): MULTI_CPU is not among the types that become FSDP.
    """
    import accelerate.state as accelerate_state

    original = accelerate_state.AcceleratorState.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        shared = accelerate_state.PartialState._shared_state
        multi_cpu, fsdp = accelerate_state.DistributedType.MULTI_CPU, accelerate_state.DistributedType.FSDP
        plugin = options.get("fsdp_plugin")
        if shared.get("distributed_type") == multi_cpu and plugin is not None:
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin
            self.distributed_type = shared["distributed_type"] = fsdp

    accelerate_state.AcceleratorState.__init__ = init


def build_trainer(directory: Path, *, seed: int = 0, num_layers: int = 4) -> Any:
    from transformers import Trainer, TrainingArguments

    sharding = {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "state_dict_type": "FULL_STATE_DICT" if "full" in directory.name else "SHARDED_STATE_DICT",
        },
    }
    arguments = TrainingArguments(
        output_dir=str(directory),
        use_cpu=True,
        max_steps=LAST,
        save_strategy="steps",
        save_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        **(sharding if dist.get_world_size() > 1 else {}),
    )
    model = build_model(tied=directory.name.startswith("tied"), num_layers=num_layers, seed=seed)
    return Trainer(model=model, args=arguments, train_dataset=Sentences())


def saving_at(*steps: int) -> Any:
    from transformers import TrainerCallback

    class SaveAt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_save = state.global_step in steps
            return control

    return SaveAt()


def trainer_save(directory: Path) -> None:
    trainer = build_trainer(directory)
    trainer.add_callback(saving_at(FIRST, SECOND, LAST))
    trainer.add_callback(write_after_save(trainer, directory))
    trainer.train()
    write_full_state(trainer.model_wrapped, trainer.optimizer, directory / "final.pt")


def write_after_save(trainer: Any, directory: Path) -> Any:
    from transformers import TrainerCallback

    class WriteSaved(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            write_full_state(trainer.model_wrapped, trainer.optimizer, directory / f"saved-{state.global_step}.pt")

    return WriteSaved()


def trainer_resume(checkpoint: Path) -> None:
    from transformers import TrainerCallback

    class WriteLoaded(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            write_full_state(trainer.model_wrapped, trainer.optimizer, checkpoint.parent / "loaded.pt")

    trainer = build_trainer(checkpoint.parent, seed=1)
    trainer.add_callback(saving_at(LAST))
    trainer.add_callback(WriteLoaded())
    trainer.train(resume_from_checkpoint=str(checkpoint))
    write_full_state(trainer.model_wrapped, trainer.optimizer, checkpoint.parent / "final.pt")


ACTIONS = {
    ("loop", "save"): loop_save,
    ("loop", "resume"): loop_resume,
    ("trainer", "save"): trainer_save,
    ("trainer", "resume"): trainer_resume,
}


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    kind, action, *paths = sys.argv[1:]
    if kind == "trainer":
        let_accelerate_shard_on_the_cpu()
    dist.init_process_group("gloo")
    for path in paths:
        ACTIONS[kind, action](Path(path))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
