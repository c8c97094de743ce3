from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from faults import LAYERS, fake_layer, flip_bit, open_descriptors, overwrite, save_fake
from llmtailor.checkpoint import Checkpoint
from llmtailor.errors import FormatError, IntegrityError, NotFoundError
from llmtailor.formats.manifest_file import read_manifest
from llmtailor.formats.safetensors import plan_layout
from llmtailor.manifest import MANIFEST_NAME, FileRecord, Manifest, digest_of, encode_manifest
from llmtailor.storage import FileReader, RunDirectory, file_reading
from llmtailor.tensors import TensorMeta
from llmtailor.verify import FileState, open_published, verify_checkpoint


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[Checkpoint]:
    run = RunDirectory(tmp_path / "run")
    yield save_fake(run, 10)
    run.close()


def rewrite_manifest(checkpoint: Checkpoint, manifest: Manifest) -> None:
    overwrite(checkpoint.path / MANIFEST_NAME, encode_manifest(manifest)[0])


def rewrite_file(checkpoint: Checkpoint, name: str, content: bytes) -> None:
    """Change a file and the manifest with it, as a writer that makes a mistake would."""
    overwrite(checkpoint.path / name, content)

    def correct(record: FileRecord | None) -> FileRecord | None:
        if record is None or record.path != name:
            return record
        return FileRecord(path=name, bytes=len(content), digest=digest_of(content))

    layers = tuple(
        layer.model_copy(update={"weights": correct(layer.weights), "optimizer": correct(layer.optimizer)})
        for layer in checkpoint.manifest.layers
    )
    rewrite_manifest(checkpoint, checkpoint.manifest.model_copy(update={"layers": layers}))


def lay_out(*names: str, shape: tuple[int, ...] = (3,), dtype: str = "F32") -> bytes:
    layout = plan_layout([(name, TensorMeta(dtype=dtype, shape=shape)) for name in names], {})
    return layout.prefix.ljust(layout.nbytes, b"\0")


def refuse_with(number: int) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse


# read_manifest


def test_read_manifest(saved: Checkpoint) -> None:
    assert read_manifest(saved.path) == (saved.manifest, saved.digest)


def test_read_manifest_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        read_manifest(tmp_path / "checkpoint-5")
    assert caught.value.kind == "missing-checkpoint"


def test_read_manifest_of_another_tools_directory(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_text("theirs")
    with pytest.raises(NotFoundError) as caught:
        read_manifest(tmp_path)
    assert caught.value.kind == "missing-manifest"
    assert "pytorch_model.bin" in str(caught.value)


def test_read_manifest_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").write_text("a file")
    with pytest.raises(NotFoundError):
        read_manifest(tmp_path / "checkpoint-5")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_read_manifest_that_is_no_file(saved: Checkpoint, make: Any) -> None:
    (saved.path / MANIFEST_NAME).unlink()
    make(saved.path / MANIFEST_NAME)
    with pytest.raises(FormatError) as caught:
        read_manifest(saved.path)
    assert caught.value.kind == "not-regular"


def test_read_manifest_of_insane_size_reads_none_of_it(saved: Checkpoint) -> None:
    path = saved.path / MANIFEST_NAME
    path.chmod(0o644)
    os.truncate(path, 2**40)
    with pytest.raises(FormatError) as caught:
        read_manifest(saved.path)
    assert caught.value.kind == "manifest-size"


NO_EVIDENCE = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENOMEM]


@pytest.mark.parametrize("number", NO_EVIDENCE, ids=errno.errorcode.get)
def test_error_of_the_device_is_raised_as_it_is(
    saved: Checkpoint, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """It says nothing about the checkpoint: not of the manifest ..."""
    monkeypatch.setattr(os, "open", refuse_with(number))
    for read in (read_manifest, verify_checkpoint):
        with pytest.raises(OSError) as caught:
            read(saved.path)
        assert type(caught.value).__module__ == "builtins"
        assert caught.value.errno == number


@pytest.mark.parametrize("number", NO_EVIDENCE, ids=errno.errorcode.get)
def test_error_of_the_device_in_a_file_is_raised_as_it_is(
    saved: Checkpoint, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """... nor of the files."""
    real = os.open

    def open_all_but_one(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith("scheduler.pt"):
            raise OSError(number, os.strerror(number), path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_all_but_one)
    with pytest.raises(OSError) as caught:
        verify_checkpoint(saved.path)
    assert caught.value.errno == number


# verify_checkpoint


def test_verify_good_checkpoint(saved: Checkpoint) -> None:
    seen: list[str] = []
    report = verify_checkpoint(saved.path, on_file=lambda record: seen.append(record.path))
    assert report.is_good
    report.raise_if_bad()
    assert (report.step, report.num_files, report.nbytes) == (10, 12, saved.manifest.nbytes)
    assert seen == [record.path for record in saved.manifest.all_files]
    assert report.unlisted == ()


def test_verify_reports_every_problem(saved: Checkpoint) -> None:
    (saved.path / "model-norm.safetensors").unlink()
    flip_bit(saved.path / "scheduler.pt", 100)
    overwrite(saved.path / "tokenizer/vocab.txt", b"")
    (saved.path / "optimizer/layers.0.safetensors").unlink()
    (saved.path / "optimizer/layers.0.safetensors").symlink_to("layers.1.safetensors")
    report = verify_checkpoint(saved.path)
    assert {(problem.path, problem.layer, problem.kind) for problem in report.problems} == {
        ("model-norm.safetensors", "norm", "missing-file"),
        ("scheduler.pt", None, "digest"),
        ("tokenizer/vocab.txt", None, "file-size"),
        ("optimizer/layers.0.safetensors", "layers.0", "not-regular"),
    }
    with pytest.raises(IntegrityError) as caught:
        report.raise_if_bad()
    assert "4 of 12 files" in str(caught.value)
    for name in ("model-norm", "scheduler.pt", "vocab.txt", "layers.0"):
        assert name in str(caught.value)


def test_verify_of_a_missing_subdirectory(saved: Checkpoint) -> None:
    shutil.rmtree(saved.path / "optimizer")
    kinds = [problem.kind for problem in verify_checkpoint(saved.path).problems]
    assert kinds == ["missing-file"] * len(LAYERS)


def test_verify_of_a_bad_manifest(saved: Checkpoint) -> None:
    flip_bit(saved.path / MANIFEST_NAME, 1000)
    report = verify_checkpoint(saved.path)
    assert report.step is None
    assert [(problem.path, problem.kind) for problem in report.problems] == [(MANIFEST_NAME, "manifest-digest")]


def test_verify_of_the_wrong_step(saved: Checkpoint) -> None:
    renamed = saved.path.rename(saved.path.with_name("checkpoint-11"))
    assert [problem.kind for problem in verify_checkpoint(renamed).problems] == ["wrong-step"]


@pytest.mark.parametrize("name", ["_checkpoint-10.bad", "best", "checkpoint-x", "checkpoint-0010"])
def test_verify_under_another_name(saved: Checkpoint, name: str) -> None:
    assert verify_checkpoint(saved.path.rename(saved.path.with_name(name))).is_good


def test_verify_through_a_symlink_to_the_checkpoint(saved: Checkpoint) -> None:
    link = saved.path.with_name("checkpoint-99")
    link.symlink_to(saved.path)
    assert verify_checkpoint(link).is_good


def test_verify_reports_files_nobody_listed(saved: Checkpoint) -> None:
    (saved.path / "optimizer" / "note").write_text("x")
    report = verify_checkpoint(saved.path)
    assert report.is_good
    assert report.unlisted == ("optimizer/note",)


def test_verify_reads_a_shared_file_once(saved: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    digests: dict[FileState, str] = {}
    verify_checkpoint(saved.path, digests=digests)
    assert len(digests) == len(saved.manifest.all_files)
    assert set(digests.values()) == {record.digest for record in saved.manifest.all_files}

    def refuse(*args: Any) -> str:
        raise AssertionError("read again")

    monkeypatch.setattr(FileReader, "digest", refuse)
    assert verify_checkpoint(saved.path, digests=digests).is_good


def test_verify_without_the_layers_checks_the_other_files_alone(saved: Checkpoint) -> None:
    for name in ("scheduler.pt", "model-norm.safetensors"):
        flip_bit(saved.path / name, 100)
    report = verify_checkpoint(saved.path, has_layers=False)
    assert [problem.path for problem in report.problems] == ["scheduler.pt"]
    assert report.nbytes == sum(record.bytes for record in saved.manifest.files)


def test_verify_with_many_threads_tells_the_same_in_the_same_order(
    saved: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for record in saved.manifest.all_files[::2]:
        flip_bit(saved.path / record.path, 8 * record.bytes - 1)
    expected = verify_checkpoint(saved.path)
    monkeypatch.setattr(file_reading, "PIECE_NBYTES", 4096)
    seen: list[str] = []
    busy = threading.Lock()

    def on_file(record: FileRecord) -> None:
        assert busy.acquire(blocking=False)
        seen.append(record.path)
        busy.release()

    names: set[str] = set()
    real = FileReader.digest

    def digest(self: FileReader, *args: Any) -> str:
        names.add(threading.current_thread().name)
        return real(self, *args)

    monkeypatch.setattr(FileReader, "digest", digest)
    for _ in range(20):
        seen.clear()
        assert verify_checkpoint(saved.path, on_file=on_file) == expected
        assert seen == [record.path for record in saved.manifest.all_files]
    assert len(expected.problems) == 6
    assert names <= {f"llmtailor-read-{number}" for number in range(4)}


@pytest.mark.parametrize(
    "content",
    [
        lay_out(),
        lay_out("other.weight"),
        lay_out("norm.weight", "more"),
        lay_out("norm.weight", shape=(3, 1)),
        lay_out("norm.weight", shape=(4,)),
        lay_out("norm.weight", dtype="I32"),
    ],
    ids=["nothing", "another tensor", "one more", "another shape", "another size", "another dtype"],
)
def test_verify_weights_file_that_does_not_hold_its_layer(saved: Checkpoint, content: bytes) -> None:
    """Its digest is right: the writer made a mistake."""
    rewrite_file(saved, "model-norm.safetensors", content)
    assert [(problem.layer, problem.kind) for problem in verify_checkpoint(saved.path).problems] == [("norm", "schema")]


@pytest.mark.parametrize("name", ["state.layers.0.weight.exp_avg", "norm.weight", "state.norm.weight", "state.norm"])
def test_verify_optimizer_file_with_state_of_another_layer(saved: Checkpoint, name: str) -> None:
    rewrite_file(saved, "optimizer/norm.safetensors", lay_out("state.norm.weight.exp_avg", name))
    assert [(problem.layer, problem.kind) for problem in verify_checkpoint(saved.path).problems] == [("norm", "schema")]


@pytest.mark.parametrize("content", [b"\0" * 5000, b"", b"x" * 7])
def test_verify_layer_file_that_is_no_safetensors_file(saved: Checkpoint, content: bytes) -> None:
    rewrite_file(saved, "model-norm.safetensors", content)
    (problem,) = verify_checkpoint(saved.path).problems
    assert problem.path == "model-norm.safetensors"


def test_verify_file_name_no_disk_can_hold(saved: Checkpoint) -> None:
    record = FileRecord(path="x" * 1000, bytes=1, digest=digest_of(b""))
    rewrite_manifest(saved, saved.manifest.model_copy(update={"files": (*saved.manifest.files, record)}))
    assert [problem.kind for problem in verify_checkpoint(saved.path).problems] == ["not-regular"]


# open_published


def test_open_published(saved: Checkpoint) -> None:
    record = saved.manifest.layers[0].weights
    with open_published(saved.path, record) as descriptor:
        assert os.pread(descriptor, record.bytes, 0).endswith(fake_layer("embed_tokens", 10).files[0].content)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_open_published_refuses_other_sizes_and_other_things(saved: Checkpoint) -> None:
    record = saved.manifest.layers[0].weights
    path = saved.path / record.path

    def refuse() -> str:
        with pytest.raises((FormatError, NotFoundError)) as caught, open_published(saved.path, record):
            pass
        return caught.value.kind

    before = open_descriptors()
    overwrite(path, lay_out("embed_tokens.weight", shape=(4,)))
    assert refuse() == "file-size"
    path.unlink()
    assert refuse() == "missing-file"
    os.mkfifo(path)
    assert refuse() == "not-regular"
    assert open_descriptors() == before
