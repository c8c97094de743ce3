"""A tree as a pickle of protocol 2, as CPython and torch would write it.

What was read comes out the same byte for byte, but that equal texts are written once. Only names of data are written
at all (``class_names``).

Source: CPython 3.11, Lib/pickle.py (_Pickler, save_reduce); torch 2.13, torch/_tensor.py (_reduce_ex_internal),
torch/serialization.py (_save).
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from ...errors import UnsupportedError
from ...tensor_refs import TensorRef
from ...tensors import TensorMeta
from .class_names import is_data, is_made_of_data
from .nodes import Global, Instance, Size, TorchStorage, TorchTensor, Tree, metadata_of
from .storages import GLOBAL_OF_DTYPE, STORAGE_OF_DTYPE, storage_itemsize
from .tree_checks import check_tree

__all__ = ["encode_pickle", "encode_torch_pickle"]

_BATCH = 1000
_PYTHON_2_MODULES = {"builtins": "__builtin__", "copyreg": "copy_reg"}


def encode_pickle(tree: Tree) -> bytes:
    """A tree without tensors as a pickle of its own.

    Raises:
        FormatError: The tree is cyclic or too deep.
        UnsupportedError: There is a tensor in it, or a class nobody vouches for.
    """
    data, storages = encode_torch_pickle(tree)
    if storages:
        raise UnsupportedError(
            "a pickle outside a torch file cannot hold tensors", kind="pickle-tensor", found=f"{len(storages)} tensors"
        )
    return data


def encode_torch_pickle(tree: Tree) -> tuple[bytes, tuple[TensorRef, ...]]:
    """The ``data.pkl`` of a torch file, and what goes into ``data/0``, ``data/1``, ...

    A tensor becomes a contiguous one on a storage of its own; those with the same ``ref`` share one.

    Raises:
        FormatError: The tree is cyclic or too deep.
        UnsupportedError: There is a class in it that nobody vouches for.
    """
    check_tree(tree, None)
    writer = _Writer()
    writer.out += b"\x80\x02"
    writer.save(tree)
    writer.out += b"."
    return bytes(writer.out), tuple(writer.storages)


class _Writer:
    """The bytes so far, and what has a number in the memo. Recursive: ``check_tree`` bounds the depth."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.storages: list[TensorRef] = []
        self._storage_keys: dict[int, str] = {}
        self._count = 0
        # By ``id`` for containers, whose sharing matters, and by value for texts and names.
        self._memo: dict[object, int] = {}
        # Containers that are not in the tree: if they were freed, others could get their ``id``.
        self._kept: list[object] = []

    def save(self, node: Tree) -> None:
        save = _SAVERS.get(type(node))
        if save is None:
            raise UnsupportedError(
                "this object cannot be written into a torch file", kind="pickle-type", found=type(node).__name__
            )
        save(self, node)

    def put(self, key: object = None) -> None:
        """Give what is on top of the stack the next number."""
        number = self._count
        self.out += struct.pack("<cB", b"q", number) if number < 256 else struct.pack("<cI", b"r", number)
        if key is not None:
            self._memo[key] = number
        self._count += 1

    def get(self, key: object) -> bool:
        """Recall an object; False if it was not written before."""
        number = self._memo.get(key)
        if number is None:
            return False
        self.out += struct.pack("<cB", b"h", number) if number < 256 else struct.pack("<cI", b"j", number)
        return True

    def save_none(self, _: None) -> None:
        self.out += b"N"

    def save_bool(self, value: bool) -> None:
        self.out += b"\x88" if value else b"\x89"

    def save_int(self, value: int) -> None:
        if 0 <= value < 2**8:
            self.out += struct.pack("<cB", b"K", value)
        elif 0 <= value < 2**16:
            self.out += struct.pack("<cH", b"M", value)
        elif -(2**31) <= value < 2**31:
            self.out += struct.pack("<ci", b"J", value)
        else:
            # As short as it gets with the sign.
            content = value.to_bytes(((value if value >= 0 else ~value).bit_length() >> 3) + 1, "little", signed=True)
            if len(content) > 255:
                raise UnsupportedError("this number is too large for a torch file", kind="pickle-int", found="an int")
            self.out += struct.pack("<cB", b"\x8a", len(content)) + content

    def save_float(self, value: float) -> None:
        self.out += struct.pack(">cd", b"G", value)

    def save_str(self, value: str) -> None:
        if not self.get(value):
            content = value.encode("utf-8", "surrogatepass")
            self.out += struct.pack("<cI", b"X", len(content)) + content
            self.put(value)

    def save_bytes(self, value: bytes) -> None:
        if not self.get(value):
            self.write_call(Global("_codecs", "encode"), (value.decode("latin1"), "latin1"))
            self.put(value)

    def save_global(self, found: Global) -> None:
        # Of a class inside a class, protocol 2 cannot say the name.
        if not is_data(found) or "." in found.name:
            raise _unknown(found)
        if not self.get(found):
            module = _PYTHON_2_MODULES.get(found.module, found.module)
            self.out += b"c" + f"{module}\n{found.name}\n".encode()
            self.put(found)

    def save_list(self, items: list[Tree]) -> None:
        if not self.get(id(items)):
            self.out += b"]"
            self.put(id(items))
            self.appends(items)

    def save_tuple(self, items: tuple[Tree, ...]) -> None:
        if not items:
            self.out += b")"
        elif not self.get(id(items)):
            self.write_tuple(items)
            self.put(id(items))

    def write_tuple(self, items: Sequence[Tree]) -> None:
        """A tuple that nothing else refers to; not numbered."""
        if len(items) > 3:
            self.out += b"("
        for item in items:
            self.save(item)
        self.out += {0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(items), b"t")

    def save_dict(self, entries: dict[Tree, Tree]) -> None:
        if not self.get(id(entries)):
            self.out += b"}"
            self.put(id(entries))
            self.set_items(entries)

    def save_ordered_dict(self, entries: OrderedDict[Tree, Tree]) -> None:
        if not self.get(id(entries)):
            self.save_global(_ORDERED_DICT)
            self.out += b")R"
            self.put(id(entries))
            self.set_items(entries)
            metadata = metadata_of(entries)
            if metadata is not None:
                state = {"_metadata": metadata}
                self._kept.append(state)
                self.save_dict(state)
                self.out += b"b"

    def save_set(self, items: set[Tree]) -> None:
        if not self.get(id(items)):
            # The order of a set of texts differs between processes; the bytes of a file should not.
            kinds = {type(item) for item in items}
            ordered = sorted(items) if len(kinds) == 1 and kinds <= {str, int, bytes} else list(items)
            self.write_call(Global("builtins", "set"), (ordered,))
            self.put(id(items))

    def save_size(self, sizes: Size) -> None:
        if not self.get(id(sizes)):
            self.write_call(Global("torch", "Size"), (tuple(sizes),))
            self.put(id(sizes))

    def write_call(self, function: Global, arguments: Sequence[Tree]) -> None:
        """A call with arguments that are not in the tree."""
        self._kept.append(arguments)
        self.save_global(function)
        self.write_tuple(arguments)
        if arguments:
            self.put()
        self.out += b"R"

    def appends(self, items: Sequence[Tree]) -> None:
        for chunk in _batches(items):
            self.many(chunk, b"a", b"e")

    def set_items(self, entries: dict[Tree, Tree]) -> None:
        for chunk in _batches(list(entries.items())):
            self.many(chunk, b"s", b"u", pairs=True)

    def many(self, chunk: Sequence[Tree], one: bytes, several: bytes, *, pairs: bool = False) -> None:
        if len(chunk) > 1:
            self.out += b"("
        for item in chunk:
            for part in item if pairs else (item,):
                self.save(part)
        self.out += several if len(chunk) > 1 else one

    def save_instance(self, node: Instance) -> None:
        if self.get(id(node)):
            return
        if not is_made_of_data(node.cls):
            raise _unknown(node.cls)
        self.save_global(node.cls)
        self.save_tuple(node.arguments)
        self.out += b"R" if node.is_call else b"\x81"
        self.put(id(node))
        if node.items:
            self.appends(node.items)
        if node.entries:
            self.set_items(node.entries)
        if node.state is not None:
            self.save(node.state)
            self.out += b"b"

    def save_tensor(self, node: TorchTensor) -> None:
        if self.get(id(node)):
            return
        if node.is_parameter:
            self.save_global(Global("torch._utils", "_rebuild_parameter"))
            self.save_plain_tensor(node.ref, requires_grad=False)
            self.save_bool(node.requires_grad)
            self.write_hooks()
            self.out += b"\x87"
            self.put()
            self.out += b"R"
        else:
            self.save_plain_tensor(node.ref, requires_grad=node.requires_grad, number=False)
        self.put(id(node))

    def save_plain_tensor(self, ref: TensorRef, *, requires_grad: bool, number: bool = True) -> None:
        meta = ref.meta
        storage = STORAGE_OF_DTYPE.get(meta.dtype)
        self.save_global(_REBUILD_TYPED if storage else _REBUILD_UNTYPED)
        self.out += b"("
        if storage:
            self.refer(ref, Global("torch", storage), meta.numel)
        else:
            self.refer(ref, _UNTYPED_STORAGE, meta.nbytes)
        self.save_int(0)
        self.save_sizes(meta.shape)
        self.save_sizes(_contiguous_stride(meta))
        self.save_bool(requires_grad)
        self.write_hooks()
        if not storage:
            self.save_global(GLOBAL_OF_DTYPE[meta.dtype])
        self.out += b"t"
        self.put()
        self.out += b"R"
        if number:
            self.put()

    def save_sizes(self, sizes: tuple[int, ...]) -> None:
        self.write_tuple(sizes)
        if sizes:
            self.put()

    def write_hooks(self) -> None:
        self.save_global(_ORDERED_DICT)
        self.out += b")R"
        self.put()

    def save_storage(self, node: TorchStorage) -> None:
        if not self.get(id(node)):
            self.refer(node.ref, node.cls, node.ref.meta.nbytes // (storage_itemsize(node.cls) or 1))

    def refer(self, ref: TensorRef, cls: Global, numel: int) -> None:
        key = self._storage_keys.get(id(ref))
        if key is None:
            key = self._storage_keys[id(ref)] = str(len(self.storages))
            self.storages.append(ref)
        self.write_tuple(("storage", cls, key, "cpu", numel))
        self.put()
        self.out += b"Q"


_ORDERED_DICT = Global("collections", "OrderedDict")
_REBUILD_TYPED = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_UNTYPED = Global("torch._utils", "_rebuild_tensor_v3")
_UNTYPED_STORAGE = Global("torch.storage", "UntypedStorage")

_SAVERS: dict[type, Callable[[_Writer, Tree], None]] = {
    type(None): _Writer.save_none,
    bool: _Writer.save_bool,
    int: _Writer.save_int,
    float: _Writer.save_float,
    str: _Writer.save_str,
    bytes: _Writer.save_bytes,
    list: _Writer.save_list,
    tuple: _Writer.save_tuple,
    dict: _Writer.save_dict,
    set: _Writer.save_set,
    OrderedDict: _Writer.save_ordered_dict,
    Size: _Writer.save_size,
    Global: _Writer.save_global,
    Instance: _Writer.save_instance,
    TorchTensor: _Writer.save_tensor,
    TorchStorage: _Writer.save_storage,
}


def _batches(items: Sequence[Tree]) -> Iterable[Sequence[Tree]]:
    return (items[start : start + _BATCH] for start in range(0, len(items), _BATCH))


def _contiguous_stride(meta: TensorMeta) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for length in reversed(meta.shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


def _unknown(found: Global) -> UnsupportedError:
    return UnsupportedError(
        "an object of this class is not written into a new checkpoint: loading that would import and run it",
        kind="pickle-global",
        expected="plain values, tensors, and classes of torch, numpy, DeepSpeed and the like",
        found=str(found),
        hint="keep it out of what is saved with the checkpoint (client_state, extra state)",
    )
