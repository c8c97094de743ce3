"""Train a tiny model with the stock Trainer on several ranks; run by ``test_hf_resume`` under torchrun.

python hf_ddp_training.py OUTPUT STOP_AT [CHECKPOINT]
"""

from __future__ import annotations

import sys

import torch.distributed as dist

from tiny_models import build_llama, build_trainer


def main(output: str, stop: int, checkpoint: str | None) -> None:
    trainer = build_trainer(output, model=build_llama(num_layers=2), stop=stop, save_steps=2)
    trainer.train(resume_from_checkpoint=checkpoint)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
