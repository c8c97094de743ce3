"""What the checkpoints of a run will take, before it is run: no weights, no torch.

    name --model--> names, shapes --training--> + optimizer state --sizes--> bytes of each layer's files
    layers + strategy --simulation--> the saves of a run --estimating--> bytes written, on disk, ages

The layouts are those a save would plan, and the layers are chosen by the strategies themselves.
"""

from .assumed import DEFAULT_DRIFT_PER_STEP, assume_drift
from .estimating import Estimate, Refusal, StrategyEstimate, estimate_runs, list_strategies
from .model import ModelTensors, read_model_tensors
from .simulation import Schedule, SimulatedSave, simulate
from .sizes import LayerSize, measure_layers
from .training import OPTIMIZERS, PRECISIONS, Training

__all__ = [
    "DEFAULT_DRIFT_PER_STEP",
    "OPTIMIZERS",
    "PRECISIONS",
    "Estimate",
    "LayerSize",
    "ModelTensors",
    "Refusal",
    "Schedule",
    "SimulatedSave",
    "StrategyEstimate",
    "Training",
    "assume_drift",
    "estimate_runs",
    "list_strategies",
    "measure_layers",
    "read_model_tensors",
    "simulate",
]
