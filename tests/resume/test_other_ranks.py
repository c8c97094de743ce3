"""A checkpoint of another number of ranks is refused by its manifest, before layer files are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtailor import Run
from llmtailor.errors import IncompatibleError
from llmtailor.storage import FileReader
from tiny_models import build_llama


def build_run(directory: Path) -> Run:
    model = build_llama()
    return Run(directory, model, torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize("is_named", [False, True])
def test_another_number_of_ranks_is_refused_before_layer_files_are_read(
    is_named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with build_run(tmp_path) as run:
        run.save(1).result()
    read: list[str] = []
    real = FileReader.digest

    def digest(self: FileReader, descriptor: int, nbytes: int, path: Path, *rest: Any) -> str:
        read.append(path.name)
        return real(self, descriptor, nbytes, path, *rest)

    monkeypatch.setattr(FileReader, "digest", digest)
    with build_run(tmp_path) as run:
        monkeypatch.setattr(run, "_num_ranks", 3)
        how = {"checkpoint": tmp_path / "checkpoint-1"} if is_named else {}
        with pytest.raises(IncompatibleError) as refused:
            run.resume(**how)
    assert (refused.value.kind, refused.value.expected, refused.value.found) == ("world-size", 1, 3)
    assert read, "small files are verified first"
    assert not [name for name in read if name.endswith(".safetensors")]
    assert (tmp_path / "checkpoint-1").is_dir()
