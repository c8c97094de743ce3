"""From live tensors to a published checkpoint, while training goes on."""

from .ballot import Ballot
from .coded_images import CodedImage, code_layer
from .engine import Engine
from .frames import forget_frames
from .handle import Durability, SaveHandle, SaveStats
from .images import FileImage, LayerImage, find_masters, optimizer_image, weights_image
from .job import LinkedFile, SaveCost, SaveJob, WrittenCodes, WrittenLayer
from .life import SaveState, WhenBusy, admit
from .mirror import Mirror, MirrorHandle

__all__ = [
    "Ballot",
    "CodedImage",
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
    "WrittenCodes",
    "WrittenLayer",
    "admit",
    "code_layer",
    "find_masters",
    "forget_frames",
    "optimizer_image",
    "weights_image",
]
