"""Torch files made to do harm, or broken in a way an attacker might choose; each must be refused with a typed error.

``hostile_files`` builds them all. What would run something if it were obeyed would leave a file in a directory.
"""

from __future__ import annotations

import pickle
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

EVIDENCE = "was-run"

PROTO = b"\x80\x02"
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
HOOKS = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor(
    size: tuple[int, ...] = (2, 2), stride: tuple[int, ...] = (2, 1), *, offset: int = 0, storage: bytes = STORAGE
) -> bytes:
    """Instructions for a tensor, by default the four numbers of storage 0."""
    arguments = storage + integer(offset) + numbers(*size) + numbers(*stride) + b"\x89" + HOOKS
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def stored(numel: bytes = b"K\x04", *, cls: str = "torch\nFloatStorage", key: bytes = text("0")) -> bytes:
    return b"(" + text("storage") + f"c{cls}\n".encode() + key + text("cpu") + numel + b"tQ"


def shell(directory: Path) -> bytes:
    """An argument for what runs shell commands."""
    return text(f"touch {directory / EVIDENCE}") + b"\x85"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A record of an archive, with fields that can be wrong."""

    name: str | bytes
    data: bytes = b""
    local: dict[str, object] = field(default_factory=dict)
    central: dict[str, object] = field(default_factory=dict)
    is_listed: bool = True


LOCAL_FIELDS = ("magic", "version", "flags", "method", "time", "date", "crc", "packed", "size")
CENTRAL_FIELDS = ("magic", "made", *LOCAL_FIELDS[1:])


def zip_file(entries: list[Entry], *, comment: bytes = b"", **end: int) -> bytes:
    """An archive of these records, as they say; ``end`` overrides fields of its last record."""
    body, directory = b"", b""
    for entry in entries:
        name = entry.name.encode() if isinstance(entry.name, str) else entry.name
        size = len(entry.data)
        fields: dict[str, object] = dict.fromkeys(CENTRAL_FIELDS, 0) | {
            "crc": zlib.crc32(entry.data), "packed": size, "size": size, "name": name, "extra": b"", "offset": len(body)
        }  # fmt: skip
        local = fields | {"magic": b"PK\x03\x04"} | entry.local
        central = fields | {"magic": b"PK\x01\x02"} | entry.central
        tail = [len(local["name"]), len(local["extra"])]
        body += struct.pack("<4s5H3I2H", *(local[key] for key in LOCAL_FIELDS), *tail) + local["name"] + local["extra"]
        body += entry.data
        if entry.is_listed:
            tail = [len(central["name"]), len(central["extra"]), 0, 0, 0, 0, central["offset"]]
            directory += struct.pack("<4s6H3I5H2I", *(central[key] for key in CENTRAL_FIELDS), *tail)
            directory += central["name"] + central["extra"]
    count = sum(entry.is_listed for entry in entries)
    last = {"disk": 0, "first": 0, "here": count, "count": count, "size": len(directory), "start": len(body)} | end
    return body + directory + struct.pack("<4s4H2IH", b"PK\x05\x06", *last.values(), len(comment)) + comment


def records(program: bytes = b"K\x01", *, data: bytes = bytes(16), order: bytes = b"little") -> list[Entry]:
    """What belongs into a torch file: a pickle of these instructions and one storage of four F32."""
    return [
        Entry(name="archive/data.pkl", data=PROTO + program + b"."),
        Entry(name="archive/byteorder", data=order),
        Entry(name="archive/data/0", data=data),
        Entry(name="archive/version", data=b"3\n"),
    ]


def torch_zip(program: bytes) -> bytes:
    """A torch file with a pickle of these instructions and one storage of four F32."""
    return zip_file(records(program))


def legacy(program: bytes, *, numel: int = 4, data: bytes = bytes(16), keys: object = ("0",), magic: int = 0) -> bytes:
    """A legacy file with a pickle of these instructions and one storage of four F32."""
    head = [magic or 0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
    front = b"".join(pickle.dumps(item, 2) for item in head)
    rest = pickle.dumps(list(keys) if isinstance(keys, tuple) else keys, 2) + struct.pack("<q", numel) + data
    return front + PROTO + program + b"." + rest


LEGACY_STORAGE = STORAGE.replace(b"K\x04tQ", b"K\x04NtQ")
LEGACY_TENSOR = tensor(storage=LEGACY_STORAGE)


def programs(directory: Path) -> dict[str, bytes]:
    """Instructions by what is wrong with them; ``data.pkl`` without its first and last instruction."""
    command = shell(directory)
    device = b"ctorch\ndevice\nq\x00)R"
    laughs = b"(]q\x00" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(40)) + b"t"
    return {
        "os_system": b"cos\nsystem\n" + command + b"R",
        "posix_system": b"cposix\nsystem\n" + command + b"R",
        "subprocess_popen": b"csubprocess\nPopen\n(]" + text("touch") + b"aX\x01\x00\x00\x00xatR",
        "builtins_eval": b"cbuiltins\neval\n" + text("__import__('os').system('id')") + b"\x85R",
        "python_2_eval": b"c__builtin__\neval\n" + text("1") + b"\x85R",
        "builtins_getattr": b"cbuiltins\ngetattr\ncos\n\n" + text("system") + b"\x86R",
        "builtins_import": b"c__builtin__\n__import__\n" + text("os") + b"\x85R",
        "builtins_exec_new": b"cbuiltins\nexec\n" + text("1") + b"\x85\x81",
        "nested_global": text("os") + text("path.os.system") + b"\x93" + command + b"R",
        "global_of_parts": text("builtins") + text("eval.__call__") + b"\x93" + command + b"R",
        "only_named": b"cos\nsystem\n",
        "runpy": b"crunpy\nrun_path\n" + text("/etc/hosts") + b"\x85R",
        "ctypes": b"cctypes\nCDLL\n" + text("libc.so.6") + b"\x85R",
        "pickle_loads": b"cpickle\nloads\nC\x04\x80\x02K.\x85R",
        "importlib": b"cimportlib\nimport_module\n" + text("this") + b"\x85R",
        "webbrowser": b"cwebbrowser\nopen\n" + text("http://localhost") + b"\x85R",
        "call_of_a_text": text("os.system") + command + b"R",
        "call_of_a_call": b"ctorch\ndevice\n)R" + command + b"R",
        "call_without_arguments": b"ctorch\ndevice\nK\x01R",
        "quadrillion": b"c__builtin__\nfrozenset\nc__builtin__\nxrange\n" + integer(10**15) + b"\x85R\x85R",
        "inst": b"(" + text("x") + b"itorch\nload\n",
        "obj": b"(ctorch\nload\n" + text("x") + b"o",
        "ext_1": b"\x82\x01",
        "ext_2": b"\x83\x01\x00",
        "ext_4": b"\x84\x01\x00\x00\x00",
        "persistent_text": b"Pos.system\n",
        "persistent_number": b"K\x01Q",
        "persistent_list": b"]Q",
        "persistent_empty": b")Q",
        "persistent_module": b"(" + text("module") + b"cos\nsystem\nNNtQ",
        "persistent_short": b"(" + text("storage") + b"ctorch\nFloatStorage\ntQ",
        "persistent_numel_true": stored(b"\x88"),
        "persistent_numel_negative": stored(b"J\xff\xff\xff\xff"),
        "persistent_numel_huge": stored(integer(2**62)),
        "persistent_numel_other": stored(b"K\x05"),
        "persistent_no_class": stored(cls="torch\nload"),
        "persistent_other_module": stored(cls="os\nFloatStorage"),
        "persistent_traversal": stored(key=text("../../etc/passwd")),
        "persistent_number_as_key": stored(key=b"K\x00"),
        "persistent_missing": stored(key=text("7")),
        "build_on_list": b"]}b",
        "build_on_number": b"K\x01}b",
        "build_on_class": b"ctorch\nTensor\n}" + text("__call__") + b"K\x01sb",
        "build_on_tensor": tensor() + b"}" + text("ref") + b"K\x01sb",
        "build_on_size": b"ctorch\nSize\n)\x85R}b",
        "build_twice": b"ctorch\ndevice\n)R}b}b",
        "build_hides_items": HOOKS + b"}" + text("items") + b"K\x01sb",
        "build_slots": HOOKS + b"N}" + text("items") + b"K\x01s\x86b",
        "memo_unknown": b"h\x07",
        "memo_unknown_long": b"j\xff\xff\xff\xff",
        "memo_of_nothing": b"q\x00",
        "memo_across_marks": b"K\x01(q\x00t",
        "pop": b"K\x01K\x020",
        "duplicate": b"]2\x86",
        "reduce_of_nothing": b"R",
        "tuple_of_nothing": b"K\x01\x87",
        "no_mark": b"t",
        "mark_left": b"K\x01(",
        "stack_left": b"K\x01K\x02",
        "nothing": b"",
        "append_to_tuple": b")K\x01a",
        "append_to_text": text("x") + b"(K\x01e",
        "append_to_class": b"ctorch\nTensor\nK\x01a",
        "set_in_list": b"]K\x00K\x01s",
        "set_in_tensor": tensor() + b"K\x00K\x01s",
        "set_odd": b"}(K\x01u",
        "add_to_list": b"](K\x01\x90",
        "key_list": b"}]K\x01s",
        "key_dict": b"}}K\x01s",
        "key_set": b"}\x8fK\x01s",
        "key_tensor": b"}" + tensor() + b"K\x01s",
        "key_tuple_of_list": b"}]\x85K\x01s",
        "key_nested_tuple": b"}" + b")" + b"\x85" * 100_000 + b"K\x01s",
        "key_shared_tuple": b"})" + b"q\x00h\x00\x86" * 60 + b"K\x01s",
        "key_large": b"}" + integer(2**61 - 1 << 64) + b"K\x01s",
        "key_in_set": b"\x8f(]\x90",
        "deep_list": b"]" * 200_000 + b"a" * 199_999,
        "deep_tuple": b")" + b"\x85" * 200_000,
        "deep_dict": b"}K\x00" * 200_000 + b"N" + b"s" * 200_000,
        "deep_instance": device + b"h\x00)R" * 200_000 + b"b" * 200_000,
        "deep_calls": b"ctorch\nTensor\nq\x01ctorch._tensor\n_rebuild_from_type_v2\nq\x00"
        + b"(h\x00h\x01" * 100_000 + b")" + b"Nt" * 100_000 + b"R\x86",
        "deep_shared": b"(" + b"]" * 40 + b"a" * 39 + b"q\x00" + b"]" * 30 + b"h\x00" + b"a" * 30 + b"t",
        "deep_65": b"]" * 66 + b"a" * 65,
        "laughs": laughs,
        "laughs_tuple": b"()q\x00" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(40)) + b"t",
        "laughs_state": device + laughs + b"b",
        "cyclic_list": b"]q\x00h\x00a",
        "cyclic_dict": b"}q\x00K\x00h\x00s",
        "cyclic_instance": b"ctorch\ndevice\n)Rq\x00}K\x00h\x00sb",
        "cyclic_metadata": HOOKS + b"q\x00}" + text("_metadata") + b"h\x00sb",
        "long_4_lies": b"\x8b\xff\xff\xff\x7f",
        "long_4_negative": b"\x8b\xff\xff\xff\xff",
        "long_4_huge": b"\x8b" + struct.pack("<I", 10_000_000) + bytes(10_000_000),
        "long_1_huge": b"\x8a\xff" + bytes(255),
        "text_lies": b"X\xff\xff\xff\x7f",
        "text_8_lies": b"\x8d" + b"\xff" * 8,
        "bytes_8_lies": b"\x8e" + struct.pack("<Q", 2**62),
        "bytearray_8_lies": b"\x96" + struct.pack("<Q", 2**40),
        "frame_lies": b"\x95" + struct.pack("<Q", 2**63),
        "buffer": b"\x97",
        "text_not_utf8": b"X\x02\x00\x00\x00\xff\xfe",
        "unknown_instruction": b"\xff",
        "zero_instruction": b"\x00",
        "protocol_again": b"\x80\x09K\x01",
        "text_integer": b"I1\n",
        "text_float": b"F1\n",
        "text_long": b"L1L\n",
        "text_string": b"S'x'\n",
        "text_put": b"]p0\n",
        "name_endless": b"c" + b"a" * 5000 + b"\nb\n",
        "name_empty": b"c\n\n",
        "name_control": b"ctorch\x00\nload\n",
        "name_not_text": b"K\x01K\x02\x93",
        "second_pickle": b"K\x01." + PROTO + b"cos\nsystem\n" + command + b"R",
        "tensor_negative_stride": tensor((2, 2), (-2, 1)),
        "tensor_negative_size": tensor((-2, -2), (2, 1)),
        "tensor_negative_offset": tensor(offset=-1),
        "tensor_out_of_storage": tensor((2, 3), (3, 1)),
        "tensor_offset_out": tensor(offset=1),
        "tensor_stride_out": tensor((2, 2), (3, 1)),
        "tensor_huge_offset": tensor(offset=2**62),
        "tensor_expanded": tensor((2**40,), (0,)),
        "tensor_expanded_dims": tensor((2**62,) * 60, (0,) * 60),
        "tensor_huge_numel": tensor((2**62, 2**62), (2**62, 1)),
        "tensor_many_dims": tensor((1,) * 65, (1,) * 65),
        "tensor_other_strides": tensor((2, 2), (1,)),
        "tensor_of_no_storage": tensor(storage=b"N"),
        "tensor_without_arguments": b"ctorch._utils\n_rebuild_tensor_v2\n)R",
        "tensor_text_size": tensor().replace(numbers(2, 2), text("ab")).replace(numbers(2, 1), text("ab")),
        "tensor_grad_number": tensor().replace(b"\x89" + HOOKS, b"K\x01" + HOOKS),
        "tensor_hooks": tensor().replace(b"\x89" + HOOKS, b"\x89}K\x00K\x01s"),
        "parameter_of_nothing": b"ctorch._utils\n_rebuild_parameter\n)R",
        "size_of_text": b"ctorch\nSize\n" + text("ab") + b"\x85R",
    }  # fmt: skip


def exhausting_programs() -> dict[str, bytes]:
    """Instructions that make as many objects as they can; it takes seconds until they are stopped."""
    return {
        "many_objects": b"(" + b"\x8f" * 2_000_000 + b"t",
        "many_marks": b"(" * 4_000_000,
        "many_lists": b"(" + b"]" * 1_300_000 + b"t",
        "many_tuples": b"(" + b"N\x85" * 1_600_000 + b"t",
        "many_memos": b"N" + b"\x94" * 2_200_000,
    }


def copying_programs() -> dict[str, bytes]:
    """Small pickles that ask for a copy of one large thing, again and again, by its number in the memo."""
    numbers = b"(" + b"".join(struct.pack("<cH", b"M", n) for n in range(2**16))
    many = 5000
    return {
        "sets": b"(cbuiltins\nset\nq\x00]q\x01" + numbers + b"e" + b"h\x00h\x01\x85R" * many + b"t",
        "no_sets": b"(cbuiltins\nset\nq\x00]q\x01" + numbers + b")\x85e" + b"h\x00h\x01\x85R" * many + b"t",
        "sizes": b"(ctorch\nSize\nq\x00" + numbers + b"tq\x01" + b"h\x00h\x01\x85R" * many + b"t",
        "texts": b"(c_codecs\nencode\nq\x00" + text("a" * 2**18) + b"q\x01" + text("latin1") + b"q\x02"
        + b"h\x00h\x01h\x02\x86R" * many + b"t",
        "no_tensors": b"(ctorch._tensor\n_rebuild_from_type_v2\nq\x00ctorch\nTensor\nq\x01ctorch\nSize\nq\x02"
        + numbers + b"t\x85q\x03" + b"h\x00(h\x02h\x01h\x03NtR" * many + b"t",
    }  # fmt: skip


def archives() -> dict[str, bytes]:
    """Zip archives by what is wrong with them."""
    pickled, order, storage, version = records(tensor())
    wide = struct.pack("<2H3Q", 1, 24, 16, 16, 0)

    def with_storage(**changes: object) -> bytes:
        entry = {"name": storage.name, "data": storage.data} | changes
        return zip_file([pickled, order, Entry(**entry), version])

    def with_record(name: str | bytes, data: bytes = b"x") -> bytes:
        return zip_file([pickled, order, storage, version, Entry(name=name, data=data)])

    def with_end(**end: int) -> bytes:
        return zip_file(records(tensor()), **end)

    inner = Entry(name="archive/data/1", data=bytes(8))
    inner_bytes = zip_file([inner])[: 30 + 14 + 8]
    outer = Entry(name="archive/data/0", data=inner_bytes)
    inner_at = len(zip_file([pickled, Entry(name="archive/data/0")])) - 22 - 2 * 46 - len("archive/data.pkl") - 14
    overlapping = [pickled, outer, Entry(name="archive/data/1", data=b"", central={"offset": inner_at, "size": 8,
                   "packed": 8, "crc": 0})]  # fmt: skip
    bomb = zlib.compress(bytes(2**24), 9)[2:-4]
    return {
        "bomb": with_storage(data=bomb, local={"method": 8}, central={"method": 8, "size": 2**31 - 1}),
        "bomb_said_stored": with_storage(data=bomb, central={"size": 2**31 - 1}),
        "bomb_said_by_local_header": with_storage(local={"method": 8}),
        "pickle_packed": zip_file([Entry(name=pickled.name, data=bomb, central={"method": 8}), order, storage]),
        "encrypted": with_storage(central={"flags": 1}),
        "encrypted_said_by_local_header": with_storage(local={"flags": 1}),
        "patched": with_storage(central={"flags": 32}),
        "name_up": with_record("archive/../../evil"),
        "name_root_up": zip_file([Entry(name=f"../{e.name.split('/', 1)[1]}", data=e.data) for e in records()]),
        "name_root_empty": zip_file([Entry(name=f"/{e.name.split('/', 1)[1]}", data=e.data) for e in records()]),
        "name_absolute": with_record("/etc/passwd"),
        "name_other_root": with_record("other/data/1"),
        "name_backslash": with_record("archive\\data\\1"),
        "name_program": with_record("archive/evil.py"),
        "name_directory": with_record("archive/data/"),
        "name_nested": with_record("archive/data/0/1"),
        "name_number": with_record("archive/data/\u0661"),
        "name_null": with_record(b"archive/data/1\0"),
        "name_control": with_record("archive/data/1\n"),
        "name_not_utf8": with_record(b"archive/data/\xff"),
        "name_endless": with_record("archive/data/" + "1" * 2000),
        "name_empty": with_record(""),
        "name_without_root": with_record("data.pkl"),
        "torchscript": with_record("archive/constants.pkl"),
        "torchscript_code": with_record("archive/code/__torch__.py"),
        "duplicate": with_record("archive/data/0", bytes(16)),
        "duplicate_pickle": with_record("archive/data.pkl", PROTO + b"cos\nsystem\n."),
        "overlap": zip_file(overlapping),
        "same_place_twice": zip_file([pickled, storage, Entry(name="archive/data/0", central={"offset": 0})]),
        "no_pickle": zip_file([order, storage, version]),
        "no_records": zip_file([]),
        "big_endian": zip_file(records(tensor(), order=b"big")),
        "no_order": zip_file(records(tensor(), order=b"")),
        "storage_small": with_storage(data=bytes(12)),
        "storage_large": with_storage(data=bytes(20)),
        "storage_missing": zip_file([pickled, order, version]),
        "size_lies": with_storage(central={"size": 2**31, "packed": 2**31}),
        "size_lies_to_the_next": with_storage(central={"size": 100, "packed": 100}),
        "size_said_otherwise_by_local_header": with_storage(local={"size": 12, "packed": 12}),
        "size_out": with_storage(central={"size": 2**31, "packed": 2**31}, local={"size": 0, "packed": 0}),
        "size_wide_without_number": with_storage(central={"size": 2**32 - 1, "packed": 2**32 - 1}),
        "size_wide_lies": with_storage(central={"size": 2**32 - 1, "packed": 2**32 - 1,
                                                "extra": struct.pack("<2H2Q", 1, 16, 2**62, 2**62)}),
        "offset_lies": with_storage(central={"offset": 3}),
        "offset_out": with_storage(central={"offset": 2**31}),
        "offset_wide_out": with_storage(central={"offset": 2**32 - 1, "extra": struct.pack("<2HQ", 1, 8, 2**63)}),
        "offset_wide_other": with_storage(central={"offset": 2**32 - 1, "extra": wide[:-8]}),
        "extra_out": with_storage(local={"extra": b"FB\xff\xff" + bytes(60_000)}, data=b""),
        "name_said_otherwise_by_local_header": with_storage(local={"name": b"archive/data/1"}),
        "magic_of_record": with_storage(local={"magic": b"PK\x03\x05"}),
        "magic_of_entry": with_storage(central={"magic": b"PK\x01\x03"}),
        "crc_of_pickle": zip_file([Entry(name=pickled.name, data=pickled.data, central={"crc": 1}), order, storage]),
        "count_large": with_end(here=5, count=5),
        "count_small": with_end(here=3, count=3),
        "count_zero": with_end(here=0, count=0),
        "count_other": with_end(here=3),
        "count_wide_without_number": with_end(here=0xFFFF, count=0xFFFF),
        "directory_out": with_end(start=2**31),
        "directory_shifted": with_end(start=1),
        "directory_large": with_end(size=2**31),
        "directory_wide_without_number": with_end(start=2**32 - 1),
        "second_disk": with_end(disk=1),
        "first_disk": with_end(first=1),
        "packed_smaller": with_storage(central={"packed": 15}, local={"size": 0, "packed": 0}),
        "comment_missing": zip_file(records(tensor()))[:-2] + b"\x05\x00",
        "comment": zip_file(records(tensor()), comment=b"hello"),
        "trailing": zip_file(records(tensor())) + b"x",
        "leading": b"x" + zip_file(records(tensor())),
        "two_archives": zip_file(records()) + zip_file(records(tensor())),
        "two_ends": two_ends(),
        "only_magic": b"PK\x03\x04",
        "only_end": zip_file([])[-22:],
    }  # fmt: skip


def two_ends() -> bytes:
    """An archive whose zip64 end tells of an empty directory, and whose old end of a full one."""
    plain = zip_file(records(tensor()))
    body, end = plain[:-22], plain[-22:]
    wide = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 0, 0, 0, 0, 0, 0, 0, len(body))
    return body + wide + struct.pack("<4sIQI", b"PK\x06\x07", 0, len(body), 1) + end


def legacy_files(directory: Path) -> dict[str, bytes]:
    """Files without an archive, by what is wrong with them."""
    view = LEGACY_STORAGE.replace(b"NtQ", text("v") + integer(1) + integer(4) + b"\x87tQ")
    bad_head = PROTO + b"cos\nsystem\n" + shell(directory) + b"R."
    other = tensor(storage=LEGACY_STORAGE.replace(b"K\x04N", b"K\x05N"))
    return {
        "magic": legacy(LEGACY_TENSOR, magic=1),
        "numel_large": legacy(LEGACY_TENSOR, numel=5),
        "numel_huge": legacy(LEGACY_TENSOR, numel=2**62),
        "numel_negative": legacy(LEGACY_TENSOR, numel=-4),
        "numel_negative_twice": legacy(
            tensor((0,), (1,), storage=LEGACY_STORAGE.replace(b"K\x04N", integer(-4) + b"N")), numel=-4
        ),
        "numel_small": legacy(LEGACY_TENSOR, numel=3),
        "data_short": legacy(LEGACY_TENSOR, data=bytes(15)),
        "data_long": legacy(LEGACY_TENSOR, data=bytes(17)),
        "keys_missing": legacy(LEGACY_TENSOR, keys=()),
        "keys_more": legacy(LEGACY_TENSOR, keys=("0", "1")),
        "keys_twice": legacy(LEGACY_TENSOR, keys=("0", "0"), data=bytes(16) + struct.pack("<q", 4) + bytes(16)),
        "keys_numbers": legacy(LEGACY_TENSOR, keys=(0,)),
        "keys_lists": legacy(LEGACY_TENSOR, keys=([],)),
        "keys_text": legacy(LEGACY_TENSOR, keys="0"),
        "view_out": legacy(tensor((1,), (1,), storage=view)),
        "view_malformed": legacy(tensor(storage=LEGACY_STORAGE.replace(b"NtQ", b"K\x01tQ"))),
        "storage_without_view": legacy(tensor()),
        "two_sizes": legacy(LEGACY_TENSOR + other + b"\x86"),
        "module": legacy(b"(" + text("module") + b"ctorch\nTensor\nNNtQ"),
        "hostile_object": legacy(b"cos\nsystem\n" + shell(directory) + b"R"),
        "hostile_head": bad_head + legacy(LEGACY_TENSOR),
        "hostile_version": pickle.dumps(0x1950A86A20F9469CFC6C, 2) + bad_head,
        "hostile_keys": legacy(b"N", keys=()).replace(pickle.dumps([], 2), bad_head),
        "only_head": pickle.dumps(0x1950A86A20F9469CFC6C, 2),
        "bare_pickle": pickle.dumps({"a": 1}, 2),
        "big_endian": legacy(LEGACY_TENSOR).replace(b"\x88u", b"\x89u"),
        "endless_text": legacy(b"X\xff\xff\xff\x7f"),
    }


def other_files() -> dict[str, bytes]:
    """What is no torch file at all."""
    return {
        "empty": b"",
        "byte": b"\x80",
        "text": b"hello\n" * 100,
        "tar": bytes(257) + b"ustar\x0000" + bytes(1000),
        "safetensors": struct.pack("<Q", 2) + b"{}",
        "program": b"\x7fELF" + bytes(100),
        "zeros": bytes(10_000),
        "truncated_zip": zip_file(records(tensor()))[:-5],
    }


def hostile_files(directory: Path) -> dict[str, bytes]:
    """All of them but those that take long, by name."""
    return {
        **{f"pickle_{name}": torch_zip(program) for name, program in programs(directory).items()},
        **{f"zip_{name}": content for name, content in archives().items()},
        **{f"legacy_{name}": content for name, content in legacy_files(directory).items()},
        **{f"other_{name}": content for name, content in other_files().items()},
    }
