"""From live tensors to a published checkpoint."""

from .blocking import LinkedFile, SaveJob, WrittenLayer, write_checkpoint
from .handle import SaveHandle, SaveStats
from .images import FileImage, LayerImage, optimizer_image, weights_image

__all__ = [
    "FileImage",
    "LayerImage",
    "LinkedFile",
    "SaveHandle",
    "SaveJob",
    "SaveStats",
    "WrittenLayer",
    "optimizer_image",
    "weights_image",
    "write_checkpoint",
]
