"""Make the small DeepSpeed checkpoints in ``data/deepspeed-<version>/``.

    python tests/compat/make_deepspeed.py [name ...]

Each directory is what the framework wrote, but for code (zero_to_fp32.py) and files that no test reads. ``<name>.json``
beside it has digests of the tensors as the live engine held them. Run it again for a new version of DeepSpeed, and keep
the old directory: old checkpoints are read forever.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from merge.deepspeed_training import Training, digest, run_trainings

# Name -> ranks and settings; ``out`` is filled in.
_TRAINER = {"engine": False}
_ENGINE = {"engine": True}
# Sizes that are no multiples of 8 elements, so that there is alignment and padding.
_UNEVEN = {"width": 12, "heads": 2}
FIXTURES: dict[str, tuple[int, dict[str, object]]] = {
    "z1-fp32": (2, {"stage": 1, "dtype": "fp32", **_TRAINER}),
    "z2-bf16": (2, {"stage": 2, **_TRAINER}),
    "z3-bf16": (2, {"stage": 3, **_TRAINER}),
    "z3-fp32-tied-subgroups": (
        2,
        {"stage": 3, "dtype": "fp32", "tied": True, "zero": {"sub_group_size": 1500}, **_ENGINE},
    ),
    "z2-bf16-round-robin-frozen-3ranks": (
        3,
        {"stage": 2, "frozen": "embed_tokens", "zero": {"round_robin_gradients": True}, **_ENGINE},
    ),
    "z3-bf16-frozen-3ranks": (3, {"stage": 3, "frozen": "embed_tokens", **_ENGINE}),
    "z1-bf16-layer-groups": (2, {"stage": 1, "groups": "layers", **_ENGINE}),
    "z1-bf16-fp32-gradients-3ranks": (
        3,
        {"stage": 1, "config": {"data_types": {"grad_accum_dtype": "fp32"}}, **_UNEVEN, **_ENGINE},
    ),
    "z2-fp16-tied": (2, {"stage": 2, "dtype": "fp16", "tied": True, **_ENGINE}),
    "z2-bf16-sgd": (2, {"stage": 2, "optimizer": "sgd", **_ENGINE}),
    "z2-bf16-alignment": (2, {"stage": 2, "zero": {"parameter_alignment": True}, **_UNEVEN, **_ENGINE}),
    "z2-bf16-legacy-files": (2, {"stage": 2, "config": {"checkpoint": {"checkpoint_serialization": False}}, **_ENGINE}),
    "z2-bf16-elastic": (2, {"stage": 2, "zero": {"elastic_checkpoint": True}, **_ENGINE}),
    # DeepSpeed's own Adam, which has its step count as a Python int in states and groups.
    "z2-bf16-fused-adam": (
        2,
        {
            "stage": 2,
            "optimizer": "config",
            "config": {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}},
            **_ENGINE,
        },
    ),
    "z2-bf16-muon": (
        2,
        {
            "stage": 2,
            "optimizer": "config",
            "config": {"optimizer": {"type": "Muon", "params": {"lr": 1e-2}}},
            "zero": {"reduce_scatter": False},
            **_ENGINE,
        },
    ),
}
# No test looks into these.
_DROPPED = ("zero_to_fp32.py", "zero_to_torch.py", "training_args.bin", "generation_config.json")


def main(names: list[str]) -> None:
    import deepspeed

    target = Path(__file__).parent / "data" / f"deepspeed-{deepspeed.__version__}"
    with tempfile.TemporaryDirectory() as scratch:
        for name in names or FIXTURES:
            ranks, settings = FIXTURES[name]
            training = Training(**{**settings, "out": str(Path(scratch) / name), "steps": 3, "save_steps": 3})
            run_trainings([training], ranks=ranks, scratch=Path(scratch), timeout_secs=900)
            made = Path(training.out) if training.engine else Path(training.out) / "checkpoint-3"
            truth = _check_truth(made, training)
            for dropped in _DROPPED:
                for path in made.rglob(dropped):
                    path.unlink()
            shutil.rmtree(target / name, ignore_errors=True)
            shutil.copytree(made, target / name)
            (target / f"{name}.json").write_text(json.dumps(truth, indent=1) + "\n")
            sys.stdout.write(f"{name}\n")


def _check_truth(made: Path, training: Training) -> dict[str, Any]:
    """The live values, or where those are wrong what DeepSpeed reads from its files; elsewhere both must agree."""
    from merge.deepspeed_stock import read_consolidated

    truth = json.loads(training.truth(3).read_text())
    if "checkpoint" in training.config or "data_types" in training.config or training.optimizer == "config":
        return truth  # zero_to_fp32 reads neither legacy files nor those of BF16_Optimizer and Muon
    leaves = sorted({leaf for state in truth["state"].values() for leaf in state})
    for leaf in (None, *leaves):
        for fqn, tensor in read_consolidated(made / "global_step3", leaf).items():
            if fqn not in truth["master"]:
                continue  # a tied name
            place, key = (truth["master"], fqn) if leaf is None else (truth["state"][fqn], leaf)
            # DeepSpeed 0.19.8: with round_robin_gradients, safe_get_full_* look at other parameters' places.
            if training.zero.get("round_robin_gradients"):
                place[key] = digest(tensor)
            assert place[key] == digest(tensor), (leaf, fqn)
    return truth


if __name__ == "__main__":
    main(sys.argv[1:])
