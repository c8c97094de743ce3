"""A real run, made once, and the command line in this process or in one of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from llmtailor.cli.main import app
from llmtailor.manifest import MANIFEST_NAME, digest_of

NUM_SAVES = 5


@pytest.fixture(scope="session")
def template_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five checkpoints of six layers, ``parity``, a save at each step; ``lm_head`` is tied."""
    import torch
    from torch import nn

    from llmtailor import Run

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 16)
            self.down = nn.Linear(16, 8)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden + self.down(torch.relu(self.up(hidden)))

    class TinyModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = nn.Embedding(32, 8)
            self.layers = nn.ModuleList(Block() for _ in range(4))
            self.norm = nn.LayerNorm(8)
            self.lm_head = nn.Linear(8, 32, bias=False)
            self.lm_head.weight = self.embed_tokens.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            hidden = self.embed_tokens(tokens)
            for layer in self.layers:
                hidden = layer(hidden)
            return self.lm_head(self.norm(hidden))

    directory = tmp_path_factory.mktemp("cli") / "run"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyModel()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
        with Run(directory, model, optimizer, strategy="parity", save_steps=1) as run:
            run.resume()
            for step in range(1, NUM_SAVES + 1):
                tokens = torch.randint(0, 32, (4, 8))
                nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step(step)
    return directory


@pytest.fixture
def run(template_run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may spoil; files that share an inode still do, among themselves."""
    subprocess.run(["cp", "-a", template_run, tmp_path / "run"], check=True)
    return tmp_path / "run"


@pytest.fixture
def llmtailor() -> Callable[..., Result]:
    """The command line in this process."""
    runner = CliRunner()

    def invoke(*arguments: str | Path, exit_code: int = 0) -> Result:
        result = runner.invoke(app, [str(each) for each in arguments])
        assert result.exit_code == exit_code, result.output
        return result

    return invoke


@pytest.fixture
def llmtailor_json(llmtailor: Callable[..., Result]) -> Callable[..., Any]:
    """What a command with ``--json`` prints."""

    def invoke(*arguments: str | Path, exit_code: int = 0) -> Any:
        return json.loads(llmtailor(*arguments, "--json", exit_code=exit_code).stdout)

    return invoke


@pytest.fixture
def script() -> list[str]:
    """The start of an argument list that runs the command line in a process of its own."""
    return [sys.executable, "-c", "from llmtailor.cli.main import main; main()"]


@pytest.fixture
def replace_file() -> Callable[[Path, bytes], None]:
    """Put other bytes under a name, as a new inode: files of other checkpoints stay as they are."""

    def replace(path: Path, content: bytes) -> None:
        path.unlink()
        path.write_bytes(content)

    return replace


@pytest.fixture
def damage_file(replace_file: Callable[[Path, bytes], None]) -> Callable[[Path], None]:
    """Change the last byte of a file."""

    def damage(path: Path) -> None:
        content = path.read_bytes()
        replace_file(path, content[:-1] + bytes([content[-1] ^ 1]))

    return damage


@pytest.fixture
def rewrite_manifest(
    replace_file: Callable[[Path, bytes], None],
) -> Callable[[Path, Callable[[dict[str, Any]], None]], None]:
    """Change what a manifest says and close it with the right digest, as somebody with intent would."""

    def rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
        fields = json.loads((checkpoint / MANIFEST_NAME).read_bytes())
        del fields["digest"]
        change(fields)
        body = json.dumps(fields).removesuffix("}").encode()
        replace_file(checkpoint / MANIFEST_NAME, body + f',\n"digest": "{digest_of(body)}"\n}}\n'.encode())

    return rewrite


@pytest.fixture
def coded_run(run: Path, rewrite_manifest: Callable[[Path, Callable[[dict[str, Any]], None]], None]) -> Path:
    """A run whose newest checkpoint says that three layers are codes: two beside files of step 4, one without such."""
    checkpoint = run / "checkpoint-5"
    (checkpoint / "codes").mkdir()

    def encode(layer: dict[str, Any], nbytes: int, **changes: Any) -> None:
        path = f"codes/{layer['weights']['path'].removeprefix('model-')}"
        (checkpoint / path).write_bytes(bytes(nbytes))
        codes = {"path": path, "bytes": nbytes, "digest": digest_of(bytes(nbytes))}
        fields = {"step": 5, "save_index": 4, "update_count": 5, "rest": "q8", "base": "exact", "codes": codes}
        layer.update(reason="coded", encoding=fields | changes)

    def encode_layers(fields: dict[str, Any]) -> None:
        layers = {layer["name"]: layer for layer in fields["layers"]}
        assert {name for name, layer in layers.items() if layer["step"] == 4} == {
            *("embed_tokens", "layers.1", "layers.3")
        }
        moments = {"first": {"l2": 0.00601, "max": 0.004}, "second": {"l2": 0.0228, "max": 0.05}}
        encode(layers["layers.1"], 1200, errors={"weights": {"l2": 2.096e-05, "max": 3e-05}, **moments})
        encode(layers["layers.3"], 1300, errors={"weights": {"l2": 1.5e-05, "max": 3e-05}, **moments})
        layers["embed_tokens"].update(step=5, save_index=4, update_count=None, optimizer=None)
        errors = {"first": {"l2": 0.25, "max": 0.1}}
        encode(layers["embed_tokens"], 900, rest="compact", base="none", errors=errors)

    rewrite_manifest(checkpoint, encode_layers)
    return run


@pytest.fixture
def half_checkpoint(run: Path) -> Path:
    """A checkpoint without its manifest."""
    (run / "checkpoint-5" / MANIFEST_NAME).unlink()
    return run / "checkpoint-5"


@pytest.fixture
def locked_run(run: Path) -> Iterator[Path]:
    """A run that is being written."""
    from llmtailor.storage import RunDirectory

    directory = RunDirectory(run)
    yield run
    directory.close()


@pytest.fixture
def set_aside(run: Path) -> Path:
    """A run of which step 1 is superseded, and step 4 quarantined."""
    from llmtailor.storage import RunDirectory

    directory = RunDirectory(run)
    directory.quarantine(run / "checkpoint-4", "model-norm.safetensors: the file's bytes changed")
    directory.close()
    os.rename(run / "checkpoint-1", run / "_checkpoint-1.superseded")
    shutil.rmtree(run / "_staging")
    return run
