"""From live tensors to a published checkpoint, while training goes on."""

from .engine import Engine
from .handle import Durability, SaveHandle, SaveStats
from .images import FileImage, LayerImage, optimizer_image, weights_image
from .job import LinkedFile, SaveCost, SaveJob, WrittenLayer
from .life import SaveState, WhenBusy, admit
from .mirror import Mirror, MirrorHandle

__all__ = [
    "Durability",
    "Engine",
    "FileImage",
    "LayerImage",
    "LinkedFile",
    "Mirror",
    "MirrorHandle",
    "SaveCost",
    "SaveHandle",
    "SaveJob",
    "SaveState",
    "SaveStats",
    "WhenBusy",
    "WrittenLayer",
    "admit",
    "optimizer_image",
    "weights_image",
]
