"""Nothing in a torch file is obeyed: files made to do harm, and files changed at random."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from formats.hostile_files import (
    EVIDENCE,
    LEGACY_TENSOR,
    PROTO,
    copying_programs,
    exhausting_programs,
    hostile_files,
    integer,
    legacy,
    programs,
    records,
    tensor,
    torch_zip,
    zip_file,
)
from llmtailor.errors import FormatError, TailorError, UnsupportedError
from llmtailor.formats.torch_files import (
    Instance,
    TorchTensor,
    Tree,
    encode_pickle,
    open_torch_file,
    plan_torch_file,
    read_pickle,
)

NAMES = tuple(hostile_files(Path()))

# What a file is refused for, where a refusal for something else would mean that the rule is not there.
KINDS = {
    "pickle_os_system": "pickle-hostile",
    "pickle_python_2_eval": "pickle-hostile",
    "pickle_nested_global": "pickle-hostile",
    "pickle_quadrillion": "pickle-hostile",
    "pickle_inst": "pickle-opcode",
    "pickle_obj": "pickle-opcode",
    "pickle_ext_4": "pickle-opcode",
    "pickle_persistent_text": "pickle-opcode",
    "pickle_persistent_traversal": "torch-storage",
    "pickle_build_hides_items": "pickle",
    "pickle_deep_list": "pickle-tree",
    "pickle_deep_instance": "pickle-tree",
    "pickle_deep_65": "pickle-tree",
    "pickle_deep_calls": "pickle-tree",
    "pickle_deep_shared": "pickle-tree",
    "pickle_laughs": "pickle-tree",
    "pickle_cyclic_metadata": "pickle-tree",
    "pickle_bytearray_8_lies": "pickle-truncated",
    "pickle_tensor_expanded": "tensor-expanded",
    "pickle_tensor_negative_stride": "torch-tensor",
    "zip_bomb": "torch-zip-packed",
    "zip_name_up": "torch-zip-name",
    "zip_duplicate_pickle": "torch-zip-name",
    "zip_overlap": "torch-zip-overlap",
    "zip_same_place_twice": "torch-zip-overlap",
    "zip_crc_of_pickle": "torch-zip-crc",
    "zip_size_out": "torch-zip-record",
    "zip_packed_smaller": "torch-zip-packed",
    "zip_two_ends": "torch-zip-directory",
    "zip_torchscript": "torchscript",
    "legacy_numel_huge": "torch-storage",
    "legacy_numel_negative_twice": "torch-storage",
    "legacy_data_short": "torch-truncated",
    "legacy_hostile_keys": "pickle-hostile",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hostile")
    for name, content in hostile_files(directory).items():
        (directory / name).write_bytes(content)
    return directory


@pytest.mark.parametrize("content", [torch_zip(tensor()), zip_file(records()), legacy(LEGACY_TENSOR)])
def test_what_hostile_files_are_made_of_is_fine_by_itself(content: bytes, tmp_path: Path) -> None:
    # Otherwise they would all be refused, and for the wrong reason.
    path = tmp_path / "fine.pt"
    path.write_bytes(content)
    open_torch_file(path)
    torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_file_is_refused(name: str, files: Path) -> None:
    path = files / name
    with pytest.raises((FormatError, UnsupportedError)) as caught:
        open_torch_file(path)
    assert caught.value.path == str(path)
    assert str(caught.value).isprintable() or "\n" in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert KINDS.get(name, caught.value.kind) == caught.value.kind


def test_every_kind_is_of_a_file_there_is() -> None:
    assert KINDS.keys() <= set(NAMES)
    assert len(NAMES) > 200


# Run in a process of its own: a hook for everything Python tells of itself cannot be taken away again.
WATCH = """
import json, sys, time
from pathlib import Path
from llmtailor.errors import TailorError
from llmtailor.formats.torch_files import open_torch_file, read_pickle

paths = [Path(name) for name in sys.argv[1:]]
open_torch_file(paths.pop(0))
seen, escaped, slowest = {}, {}, 0.0
recording = False

def hook(event, arguments):
    if recording and event != "builtins.id":
        seen.setdefault(event, set()).add(str(arguments[0]) if event != "open" else str(arguments[2]))

def peak_nbytes():
    # Not getrusage: that starts with the peak of the process this one was forked from.
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

sys.addaudithook(hook)
before = peak_nbytes()
modules = set(sys.modules)
for path in paths:
    for read in (open_torch_file, read_pickle):
        start = time.process_time()
        recording = True
        try:
            read(path)
        except TailorError:
            pass
        except BaseException as err:
            escaped[str(path)] = repr(err)
        recording = False
        slowest = max(slowest, time.process_time() - start)
print(json.dumps({
    "seen": {event: sorted(values) for event, values in seen.items()},
    "escaped": escaped,
    "imported": sorted(set(sys.modules) - modules),
    "nbytes": peak_nbytes() - before,
    "slowest": slowest,
}))
"""


def watch(paths: list[Path], directory: Path) -> dict[str, Any]:
    """What Python did while it read these files."""
    fine = directory / "fine.pt"
    fine.write_bytes(torch_zip(tensor()))
    command = [sys.executable, "-c", WATCH, str(fine), *map(str, paths)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, cwd=paths[0].parent)
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def test_nothing_is_run_imported_or_written(files: Path, tmp_path: Path) -> None:
    watched = watch([files / name for name in NAMES], tmp_path)
    assert watched["escaped"] == {}
    assert watched["imported"] == []
    # Of the files themselves; the flags have no bit of writing.
    assert watched["seen"].keys() == {"open"}
    assert all(int(flags) & os.O_ACCMODE == os.O_RDONLY for flags in watched["seen"]["open"])
    assert {path.name for path in files.iterdir()} == set(NAMES)
    assert watched["nbytes"] < 100 * 2**20
    assert watched["slowest"] < 5


@pytest.mark.slow
@pytest.mark.parametrize("name", exhausting_programs())
def test_file_that_asks_for_all_memory_is_stopped(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(torch_zip(exhausting_programs()[name]))
    with pytest.raises(FormatError) as caught:
        open_torch_file(path)
    assert "too many" in caught.value.what
    watched = watch([path], tmp_path)
    assert watched["escaped"] == {}
    assert 0 < watched["nbytes"] < 450 * 2**20
    assert watched["slowest"] < 30


def test_small_file_that_asks_for_copies_is_stopped(tmp_path: Path) -> None:
    # Each is of 200 to 300 kB, and asks for copies of a gigabyte or more in all.
    paths = []
    for name, program in copying_programs().items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(torch_zip(program))
        with pytest.raises(FormatError) as caught:
            open_torch_file(paths[-1])
        assert "too many" in caught.value.what or "shared beyond measure" in caught.value.what
    watched = watch(paths, tmp_path)
    assert watched["escaped"] == {}
    assert watched["nbytes"] < 150 * 2**20
    assert watched["slowest"] < 5


def test_evidence_would_have_been_left(tmp_path: Path) -> None:
    # The control: what an ordinary reader does with the same instructions.
    hostile = PROTO + programs(tmp_path)["posix_system"] + b"."
    script = "import pickle, sys; pickle.loads(bytes.fromhex(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", script, hostile.hex()], check=True)
    assert (tmp_path / EVIDENCE).exists()


def test_directory_without_end_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "some.pt"
    directory_nbytes = 2**40
    end = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 0, 0, 0, 0, 9, 9, directory_nbytes, 4)
    end += struct.pack("<4sIQI", b"PK\x06\x07", 0, 4 + directory_nbytes, 1)
    end += struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 9, 9, 2**32 - 1, 4, 0)
    with path.open("wb") as file:  # a hole
        file.write(b"PK\x03\x04")
        file.seek(directory_nbytes, 1)
        file.write(end)
    with pytest.raises(FormatError) as caught:
        open_torch_file(path)
    assert caught.value.kind == "torch-zip-directory"


def test_many_tensors_in_one_storage_cost_no_more_than_their_number(tmp_path: Path) -> None:
    path = tmp_path / "many.pt"
    path.write_bytes(torch_zip(b"(" + tensor() * 20_000 + b"t"))
    tree = open_torch_file(path)
    assert len({id(node.ref) for node in tree}) == 1


@pytest.mark.parametrize(
    "keys",
    [
        b"".join(integer((2**61 - 1) * n + 1) + b"N" for n in range(2**10, 2**10 + 20_000)),
        b"".join(integer(n) + b"\x85N" for n in range(20_000)),
    ],
    ids=["numbers", "tuples"],
)
def test_keys_made_to_collide_are_refused(keys: bytes, tmp_path: Path) -> None:
    path = tmp_path / "keys.pkl"
    path.write_bytes(PROTO + b"}(" + keys + b"u.")
    with pytest.raises(FormatError):
        read_pickle(path)


# What passed through on reading does not come out in a new file.


@pytest.mark.parametrize(
    "program",
    [
        b"ctorch\nload\nX\x01\x00\x00\x00x\x85R",
        b"ctorch.hub\nload\n)R",
        b"ctorch.storage\n_load_from_bytes\n)R",
        b"ctorch._utils\nevil\n)R",
        b"cmy_training\nSettings\n)\x81",
        b"c__main__\nSettings\n)\x81",
        b"cfunctools\npartial\n)R",
        b"coperator\nmethodcaller\n)R",
        b"ctypes\nFunctionType\n)R",
        b"cnumpy\nload\n)R",
        b"cnumpy.testing\nrunstring\n)R",
        b"cmy_training\nSettings\n",
        b"\x8c\x05torch\x8c\x09Tensor.to\x93",
        b"ccollections\nnamedtuple\n)R",
    ],
)
def test_class_nobody_vouches_for_is_read_but_not_written(program: bytes, tmp_path: Path) -> None:
    path = tmp_path / "some.pt"
    path.write_bytes(torch_zip(b"]" + program + b"a"))
    tree = open_torch_file(path)
    with pytest.raises(UnsupportedError) as caught:
        plan_torch_file("some.pt", tree)
    assert caught.value.kind == "pickle-global"
    assert str(caught.value.found).split(".")[0].encode() in program


def test_class_of_a_framework_is_written(tmp_path: Path) -> None:
    path = tmp_path / "some.pt"
    program = b"cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n)\x81}X\x05\x00\x00\x00scaleK\x01sb"
    path.write_bytes(torch_zip(program))
    tree = open_torch_file(path)
    assert isinstance(tree, Instance)
    assert encode_pickle(tree).endswith(b"sb.")


# Files changed at random.


def mutations(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(changed))
            match rng.randrange(5):
                case 0:
                    changed[at] = rng.randrange(256)
                case 1:
                    changed[at] ^= 1 << rng.randrange(8)
                case 2:
                    del changed[at : at + rng.randrange(1, 9)]
                case 3:
                    changed[at:at] = rng.randbytes(rng.randrange(1, 9))
                case 4:
                    other = rng.randrange(len(changed))
                    changed[at : at + 4] = changed[other : other + 4]
            if not changed:
                break
        yield bytes(changed)


def seeds_of_mutation(directory: Path) -> dict[str, bytes]:
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    sum(p.sum() for p in optimizer.param_groups[0]["params"]).backward()
    optimizer.step()
    value = {
        "optimizer": optimizer.state_dict(),
        "sets": {"a"},
        "bytes": b"x",
        "size": torch.Size([1]),
        "n": [1.5, 2**70],
    }
    torch.save(value, directory / "zip.pt")
    torch.save(value, directory / "legacy.pt", _use_new_zipfile_serialization=False)
    names = ("zip.pt", "legacy.pt")
    return {name: (directory / name).read_bytes() for name in names} | {
        "plain": pickle.dumps([value["n"], {"a": {1}}], 4)
    }


def check_mutated(content: bytes, path: Path) -> Tree:
    """Either a typed error, or a tree that can be walked and written."""
    path.write_bytes(content)
    read = read_pickle if path.suffix == ".plain" else open_torch_file
    try:
        tree = read(path)
        plan_torch_file("some.pt", tree)
    except TailorError:
        return None
    return tree


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pt", "plain"])
def test_changed_file_gives_a_typed_error_or_a_tree(name: str, tmp_path: Path) -> None:
    content = seeds_of_mutation(tmp_path)[name]
    path = tmp_path / f"changed.{name.split('.')[0]}"
    refused = sum(check_mutated(changed, path) is None for changed in mutations(content, 1000, seed=1))
    assert 100 < refused <= 1000


def test_changed_pickle_in_a_sound_archive_gives_a_typed_error_or_a_tree(tmp_path: Path) -> None:
    seeds_of_mutation(tmp_path)
    reader = torch._C.PyTorchFileReader(str(tmp_path / "zip.pt"))
    rest = [entry for entry in records() if not entry.name.endswith("data.pkl")]  # type: ignore[arg-type]
    storages = {f"data/{n}": reader.get_record(f"data/{n}") for n in range(6)}
    path = tmp_path / "changed.zip"
    read = 0
    for changed in mutations(reader.get_record("data.pkl"), 2000, seed=2):
        entries = [type(rest[0])(name=f"archive/{name}", data=data) for name, data in storages.items()]
        pickled = type(rest[0])(name="archive/data.pkl", data=changed)
        read += check_mutated(zip_file([pickled, *entries]), path) is not None
    assert 100 < read < 1900


def test_tree_of_a_file_has_only_nodes(tmp_path: Path) -> None:
    seeds_of_mutation(tmp_path)
    tree = open_torch_file(tmp_path / "zip.pt")
    assert type(tree["optimizer"]["state"][0]["step"]) is TorchTensor
