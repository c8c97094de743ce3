"""Files of ``torch.save``, read and written without torch and without running a pickle.

``open_torch_file`` gives the tree that was saved: plain Python values, tensors as references into the file, and every
other object as an inert node that remembers its class by name. ``plan_torch_file`` is the way back.
"""

from __future__ import annotations

from .nodes import MAX_DEPTH, Global, Instance, Size, TorchStorage, TorchTensor, Tree, metadata_of
from .options import read_option, write_option
from .pickle_writer import encode_pickle
from .reading import open_torch_file, read_pickle
from .states import read_state, write_state
from .storages import DTYPE_OF_GLOBAL, GLOBAL_OF_DTYPE
from .writing import plan_torch_blob, plan_torch_file

__all__ = [
    "DTYPE_OF_GLOBAL",
    "GLOBAL_OF_DTYPE",
    "MAX_DEPTH",
    "Global",
    "Instance",
    "Size",
    "TorchStorage",
    "TorchTensor",
    "Tree",
    "encode_pickle",
    "metadata_of",
    "open_torch_file",
    "plan_torch_blob",
    "plan_torch_file",
    "read_option",
    "read_pickle",
    "read_state",
    "write_option",
    "write_state",
]
