"""What holds for every command: errors, exit codes, and a quick start."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from typer.main import get_command

from llmtailor import __version__, inventory
from llmtailor.cli.main import app

Command: TypeAlias = Callable[..., Any]


def assert_is_complete(message: str, where: str) -> None:
    """What, where, expected, found, next step."""
    first, *rest = message.splitlines()
    assert first.startswith("error: ")
    keys = [line.split()[0] for line in rest]
    assert keys == ["path", "expected", "found", "next"]
    assert where in message


def spoil(fault: str, run: Path, rewrite_manifest: Command, replace_file: Command) -> Path:
    """Break the newest checkpoint and return what to ask for."""
    newest = run / "checkpoint-5"
    manifest = newest / "tailor.json"
    match fault:
        case "no such path":
            return run / "checkpoint-50"
        case "not a directory":
            return newest / "run_state.json"
        case "not a checkpoint":
            (run / "empty").mkdir()
            return run / "empty"
        case "half a checkpoint":
            manifest.unlink()
        case "manifest changed":
            replace_file(manifest, manifest.read_bytes().replace(b"parity", b"purity"))
        case "manifest cut off":
            replace_file(manifest, manifest.read_bytes()[:-10])
        case "manifest empty":
            replace_file(manifest, b"")
        case "manifest is a link":
            manifest.rename(run / "elsewhere.json")
            manifest.symlink_to(run / "elsewhere.json")
        case "manifest is a directory":
            manifest.unlink()
            manifest.mkdir()
        case "path out of the checkpoint":
            rewrite_manifest(newest, lambda fields: fields["files"][0].update(path="../../etc/passwd"))
        case "newer version":
            rewrite_manifest(newest, lambda fields: fields.update(format_version=2, novelty=True))
        case "hole in the manifest":
            rewrite_manifest(newest, lambda fields: fields["layers"].pop())
    return newest


FAULTS = {
    "no such path": (3, "missing-path", "nothing"),
    "not a directory": (3, "missing-path", "a file"),
    "not a checkpoint": (3, "missing-manifest", "an empty directory"),
    "half a checkpoint": (3, "missing-manifest", "model-embed_tokens.safetensors"),
    "manifest changed": (5, "manifest-digest", "xxh3_128:"),
    "manifest cut off": (5, "manifest-trailer", "digest"),
    "manifest empty": (5, "manifest-trailer", "an empty file"),
    "manifest is a link": (4, "not-regular", "symbolic links"),
    "manifest is a directory": (4, "not-regular", "drwx"),
    "path out of the checkpoint": (4, "manifest-schema", "../../etc/passwd"),
    "newer version": (4, "format-version", "2"),
    "hole in the manifest": (4, "manifest-schema", "not there"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_show_says_what_is_wrong(
    run: Path, llmtailor: Command, rewrite_manifest: Command, replace_file: Command, damage_file: Command, fault: str
) -> None:
    exit_code, kind, detail = FAULTS[fault]
    path = spoil(fault, run, rewrite_manifest, replace_file)
    result = llmtailor("show", path, exit_code=exit_code)
    assert result.stdout == ""
    assert_is_complete(result.stderr, str(path))
    assert detail in result.stderr
    with_json = llmtailor("show", path, "--json", exit_code=exit_code)
    error = json.loads(with_json.stdout)["error"]
    assert (error["kind"], error["exit_code"]) == (kind, exit_code)
    assert error["type"] in {"NotFoundError", "FormatError", "IntegrityError"}
    assert with_json.stderr == result.stderr


@pytest.mark.parametrize("command", [["ls"], ["prune", "--keep", "1"]])
def test_commands_on_runs_say_what_is_wrong(tmp_path: Path, llmtailor: Command, command: list[str]) -> None:
    for path in (tmp_path, tmp_path / "typo"):
        assert_is_complete(llmtailor(*command, path, exit_code=3).stderr, str(path))


def test_locked_run_is_told_completely(locked_run: Path, llmtailor: Command) -> None:
    assert_is_complete(llmtailor("prune", locked_run, "--keep", "1", exit_code=13).stderr, str(locked_run))


def test_wrong_usage_is_exit_2(llmtailor: Command) -> None:
    assert llmtailor("ls", "--json", exit_code=2).stdout == ""
    llmtailor("ls", "--no-such-option", exit_code=2)
    assert "Did you mean 'verify'" in llmtailor("verifyy", exit_code=2).stderr


def test_an_error_of_ours_is_a_traceback_and_exit_70(
    run: Path, llmtailor: Command, llmtailor_json: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise KeyError("a slip")

    monkeypatch.setattr(inventory, "take_inventory", fail)
    stderr = llmtailor("ls", run, exit_code=70).stderr
    assert stderr.startswith("error: this is a bug in llmtailor")
    assert "Traceback" in stderr
    assert "KeyError: 'a slip'" in stderr
    assert llmtailor_json("ls", run, exit_code=70)["error"]["type"] == "KeyError"


def test_ctrl_c_is_one_line_and_exit_130(run: Path, llmtailor: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inventory, "take_inventory", interrupt)
    assert llmtailor("ls", run, exit_code=130).stderr == "\ninterrupted\n"


def test_ctrl_c_while_the_command_line_is_imported(tmp_path: Path) -> None:
    """By whatever entry: a module that stands before typer plays the signal."""
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, function = project["scripts"]["llmtailor"].split(":")
    for start in (["-c", f"from {module} import {function}; {function}()"], ["-m", "llmtailor"]):
        finished = subprocess.run(
            [sys.executable, *start, "ls"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (finished.returncode, finished.stderr) == (130, "\ninterrupted\n")


def test_what_the_operating_system_refuses_is_exit_74(
    run: Path, llmtailor: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(inventory, "take_inventory", refuse)
    assert_is_complete(llmtailor("ls", run, exit_code=74).stderr, str(run))


@pytest.mark.parametrize("fault", ["none", "damaged", "no such path"])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_closed_pipe_is_quiet(
    run: Path, script: list[str], damage_file: Command, fault: str, options: list[str]
) -> None:
    if fault == "damaged":
        damage_file(run / "checkpoint-2" / "model-norm.safetensors")
    path = run / "checkpoint-50" if fault == "no such path" else run
    reader, writer = os.pipe()
    os.close(reader)
    finished = subprocess.run(
        [*script, "verify", path, *options], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    if fault != "no such path":
        assert (finished.returncode, finished.stderr) == (141, "")
    else:
        assert_is_complete(finished.stderr, str(path))
        assert finished.returncode == (141 if options else 3)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_full_stdout_is_told_once(run: Path, script: list[str], options: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        finished = subprocess.run(
            [*script, "show", run, *options], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert finished.returncode == 74, finished.stderr
    assert finished.stderr.startswith("error: the operating system refused: No space left on device\n")
    assert len(finished.stderr.splitlines()) == 4


def test_version_and_help(llmtailor: Command) -> None:
    assert llmtailor("--version").stdout == f"llmtailor {__version__}\n"
    text = llmtailor("--help").stdout
    for command in ("ls", "show", "verify", "prune", "demo"):
        assert re.search(rf"\b{command}\b", text)


@pytest.mark.parametrize("command", ["prune", "merge", "estimate"])
def test_help_has_every_option_whole_at_80_columns(script: list[str], command: str) -> None:
    told = on_terminal([*script, command, "--help"], 80)
    defined = {
        name for each in get_command(app).commands[command].params for name in (*each.opts, *each.secondary_opts)
    }
    assert {name for name in defined if name.startswith("-")} <= set(re.split(r"[\s,/]+", told))
    assert max(map(len, told.splitlines())) <= 80


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("command", ["ls", "show", "verify"])
def test_commands_that_look_leave_heavy_libraries_out(run: Path, command: str, options: list[str]) -> None:
    code = (
        "import sys\n"
        "from llmtailor.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print(*sorted({'torch', 'numpy', 'transformers', 'llmtailor.demo'} & sys.modules.keys()), file=sys.stderr)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, command, run, *options], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.strip() == ""


def on_terminal(arguments: list[Any], columns: int) -> str:
    """What a process writes to a terminal of so many columns."""
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    # Where COLUMNS is set it is believed more than the terminal.
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"} | {"TERM": "xterm"}
    with subprocess.Popen(
        [*arguments], stdin=subprocess.DEVNULL, stdout=terminal, stderr=subprocess.DEVNULL, env=environment
    ):
        os.close(terminal)
        seen = bytearray()
        with contextlib.suppress(OSError):  # when the process has ended
            while chunk := os.read(reader, 65536):
                seen += chunk
        os.close(reader)
    return seen.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("command", ["diff", "estimate"])
def test_a_narrow_terminal_shows_every_column_whole(run: Path, script: list[str], command: str) -> None:
    """The terminal wraps what is too wide; nothing is cut, and no line ends with spaces that it would wrap, too."""
    newest = run / "checkpoint-5"
    arguments = [*script, command, newest, *([run / "checkpoint-4"] if command == "diff" else [])]
    plain = re.sub(r"\x1b\[[\d;]*m", "", on_terminal(arguments, 80))
    piped = subprocess.run(arguments, capture_output=True, text=True, check=False).stdout
    # Sentences are folded at words; rows of tables are as they are in a pipe.
    rows = [line for line in piped.splitlines() if re.search(r"\S {2,}\S+ {2,}\S", line)]
    assert any(len(row) > 80 for row in rows)
    assert {line.split()[0] for line in rows} >= ({"embed_tokens", "norm"} if command == "diff" else {"round_robin"})
    assert set(plain.splitlines()) >= set(rows)
    assert not re.search(r" $", plain, re.M)


def test_on_a_terminal_there_is_a_progress_bar_on_stderr(run: Path, script: list[str]) -> None:
    reader, terminal = pty.openpty()
    finished = subprocess.run([*script, "verify", run], stdout=subprocess.PIPE, stderr=terminal, text=True, check=False)
    os.close(terminal)
    drawn = os.read(reader, 65536).decode()
    os.close(reader)
    assert "/s" in drawn
    assert finished.stdout.startswith("OK ")
    assert "\x1b" not in finished.stdout
