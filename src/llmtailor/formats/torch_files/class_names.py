"""Names of classes and functions in pickles: those of attacks, and those that data of the frameworks we know has.

Reading a pickle runs nothing, whatever it names. But what is read from one checkpoint is written into the next, and
whoever loads that with ``weights_only=False`` imports and calls what it names; so only names of data are written.
"""

from __future__ import annotations

import re

from .nodes import Global

__all__ = ["is_data", "is_hostile", "is_made_of_data"]

# What harm needs and data does not. A file that names it was made to attack, and the rest of it deserves no trust
# either. No such list is complete, and nothing depends on this one.
_HOSTILE_MODULES = frozenset({
    "_posixsubprocess", "asyncio", "code", "codeop", "commands", "ctypes", "http", "importlib", "marshal", "nt", "os",
    "pdb", "pickle", "pip", "popen2", "posix", "pty", "pydoc", "runpy", "shutil", "socket", "subprocess", "sys",
    "timeit", "urllib", "webbrowser",
})  # fmt: skip
_BUILTIN_DATA = frozenset({
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "set", "slice",
    "str", "tuple",
})  # fmt: skip

_DATA_PACKAGES = frozenset({
    "accelerate", "bitsandbytes", "deepspeed", "lightning", "megatron", "ml_dtypes", "numpy", "peft",
    "pytorch_lightning", "torch", "torchao", "torchdata", "transformer_engine", "transformers", "trl",
})  # fmt: skip
_DATA_NAMES = frozenset({
    "_codecs.encode", "_io.BytesIO", "argparse.Namespace", "collections.Counter", "collections.OrderedDict",
    "collections.defaultdict", "collections.deque", "copyreg._reconstructor", "datetime.date", "datetime.datetime",
    "datetime.time", "datetime.timedelta", "datetime.timezone", "decimal.Decimal", "fractions.Fraction",
    "pathlib.Path", "pathlib.PosixPath", "pathlib.PurePath", "pathlib.PurePosixPath", "pathlib._local.PosixPath",
    "pathlib._local.PurePosixPath", "types.SimpleNamespace", "uuid.UUID",
})  # fmt: skip
# Functions and classes in small letters that rebuild values. Any other function of a framework might open a file.
_REBUILDING_NAMES = frozenset({
    "deepspeed.utils.tensor_fragment.fragment_address", "numpy.dtype", "numpy.ndarray",
    "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar", "numpy._core.numeric._frombuffer",
    "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar", "numpy.core.numeric._frombuffer",
    "numpy.random._pickle.__bit_generator_ctor", "numpy.random._pickle.__generator_ctor", "torch.device",
    "torch.serialization._get_layout", "torch._tensor._rebuild_from_type_v2",
})  # fmt: skip
_CLASS = re.compile(r"_*[A-Z][A-Za-z0-9_]*")
_REBUILDING = re.compile(r"torch\._utils\._rebuild_[a-z0-9_]+")


def is_hostile(found: Global) -> bool:
    """Whether the name stands in no checkpoint, but in attacks."""
    if found.module == "builtins":
        return found.name not in _BUILTIN_DATA
    return found.module.partition(".")[0] in _HOSTILE_MODULES


def is_data(found: Global) -> bool:
    """Whether the name may stand in a new checkpoint."""
    if found.module == "builtins":
        return found.name in _BUILTIN_DATA
    return found.module.partition(".")[0] in _DATA_PACKAGES or str(found) in _DATA_NAMES


def is_made_of_data(found: Global) -> bool:
    """Whether a call of it may: it is a class of data, or a function that rebuilds some."""
    name = str(found)
    if found.module.partition(".")[0] not in _DATA_PACKAGES:
        return is_data(found)
    return name in _REBUILDING_NAMES or bool(_CLASS.fullmatch(found.name) or _REBUILDING.fullmatch(name))
