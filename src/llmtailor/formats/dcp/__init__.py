"""Checkpoints of ``torch.distributed.checkpoint``: FSDP2, FSDP, torchtitan, and FSDP of the HF Trainer and accelerate.

Three layouts:

    <checkpoint>/.metadata, __<rank>_<i>.distcp                                 a loop of one's own
    <checkpoint>/pytorch_model_fsdp_0/..., optimizer_0/..., trainer_state.json  HF Trainer, SHARDED_STATE_DICT
    <checkpoint>/pytorch_model_fsdp.bin, optimizer.bin, trainer_state.json      HF Trainer, FULL_STATE_DICT
"""

from __future__ import annotations

from .planning import plan_dcp
from .reading import open_dcp

__all__ = ["open_dcp", "plan_dcp"]
