"""Imports go down, never sideways, never round; importing the package stays cheap.

Only what runs when a module is imported counts: not the inside of functions, not ``if TYPE_CHECKING``.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

# Which module or package of src/llmtailor stands on which level. A new one goes here.
LEVELS = {
    "errors": 0,
    "strict_json": 0,
    "tensors": 0,
    "boxes": 0,
    "drift": 0,
    "layers": 1,
    "local_parts": 1,
    "manifest": 1,
    "manifest_rules": 1,
    "model_state": 1,
    "optimizer_check": 1,
    "optimizer_state": 1,
    "optimizer_values": 1,
    "recipe": 1,
    "shards": 1,
    "state_keys": 1,
    "state_tree": 1,
    "step_rules": 1,
    "tensor_bytes": 1,
    "tensor_filling": 1,
    "tensor_refs": 1,
    "catalog": 2,
    "codecs": 2,
    "file_plan": 2,
    "interval": 2,
    "retention": 2,
    "strategies": 2,
    "votes": 2,
    "formats": 3,
    "storage": 3,
    "assembly": 4,
    "averages": 4,
    "carried_files": 4,
    "estimate": 4,
    "hub": 4,
    "live_state": 4,
    "masters": 4,
    "mergekit_process": 4,
    "optimizer_fit": 4,
    "plan": 4,
    "progress": 4,
    "ranks": 4,
    "pruning": 4,
    "save_plan": 4,
    "verify": 4,
    "writer": 4,
    "ballots": 5,
    "checkpoint": 5,
    "checkpointer": 5,
    "diff": 5,
    "drift_log": 5,
    "flag_log": 5,
    "hold_back": 5,
    "engine_options": 5,
    "inventory": 5,
    "layer_opening": 5,
    "layer_reading": 5,
    "lineage": 5,
    "load": 5,
    "meeting": 5,
    "monitor": 5,
    "merge_sources": 5,
    "merging": 5,
    "open_runs": 5,
    "pace": 5,
    "resume": 5,
    "resume_together": 5,
    "save_history": 5,
    "save_outcomes": 5,
    "targets": 5,
    "tiers": 5,
    "zero": 5,
    "integrations": 6,
    "reports": 7,
    "demo": 8,
    "cli": 9,
}
# On these levels one module may import another, as long as it does not come back; elsewhere only downwards.
LEVELS_WITH_NEIGHBOURS = {0, 1, 4, 5}
# Inside these packages the files do not know each other ...
PACKAGES_OF_STRANGERS = {"formats", "integrations", "cli"}
# ... except those that stand for none of the strangers and serve all, and one that puts all together (as every
# package's __init__ may).
SHARED_FILES = {
    "cli._merge_options",
    "cli._output",
    "formats.manifest_file",
    "formats.numbers",
    "formats.safetensors",
    "formats.small_files",
    "formats.small_names",
    "formats.source_files",
    "formats.torch_files",
    "integrations.batches",
    "integrations.checkpoint_names",
    "integrations.deepspeed_tags",
    "integrations.lightning_dictionary",
    "integrations.lightning_loader",
    "integrations.lightning_session",
    "integrations.preemption",
    "integrations.small_files",
    "integrations.torch_loop",
    "integrations.trainer_callback",
    "integrations.trainer_deepspeed",
    "integrations.trainer_files",
    "integrations.trainer_floor",
}
ASSEMBLING_FILES = {"cli.main"}
# What the two entries to the package may import at once; the rest comes when it is first used.
ENTRIES = {"__init__": {"errors"}, "__main__": {"cli"}}

SOURCE_ROOT = Path(__file__).parent.parent / "src" / "llmtailor"


@dataclass(frozen=True)
class Import:
    """One module importing another; names are relative to the package, its own ``__init__`` is "__init__"."""

    importer: str
    target: str
    line: int
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.importer} imports {self.target} (line {self.line})"


def read_sources(root: Path = SOURCE_ROOT) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): path.read_text() for path in sorted(root.rglob("*.py"))}


def module_name(path: str) -> str:
    parts = PurePosixPath(path).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def find_imports(sources: Mapping[str, str]) -> list[Import]:
    modules = {module_name(path) for path in sources}
    return [found for path, text in sources.items() for found in _imports_of_file(path, text, modules)]


def _imports_of_file(path: str, text: str, modules: set[str]) -> Iterator[Import]:
    importer = module_name(path)
    package = ["llmtailor", *PurePosixPath(path).parts[:-1]]
    for node in _statements_run_on_import(ast.parse(text, path).body):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "llmtailor":
                    yield Import(importer, _relative(alias.name), node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            if origin.split(".")[0] != "llmtailor":
                continue
            # `from .formats import safetensors` is an import of that file; `from .formats import detect` is not.
            names = {name.name: _relative(f"{origin}.{name.name}") for name in node.names}
            yield from (Import(importer, target, node.lineno) for target in names.values() if target in modules)
            plain = tuple(name for name, target in names.items() if target not in modules)
            if plain:
                yield Import(importer, _relative(origin), node.lineno, plain)


def _relative(dotted: str) -> str:
    return dotted.partition(".")[2] or "__init__"


def _statements_run_on_import(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _statements_run_on_import(node.orelse)
            continue
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                yield from _statements_run_on_import([child])
            elif isinstance(child, ast.ExceptHandler | ast.match_case):
                yield from _statements_run_on_import(child.body)


def unit_of(module: str) -> str:
    """The module or package of the table that a file belongs to."""
    return module.split(".")[0]


def find_unlisted(sources: Mapping[str, str]) -> list[str]:
    units = {unit_of(module_name(path)) for path in sources} - set(ENTRIES)
    return [
        f"{unit} has no level: add it to LEVELS in tests/test_architecture.py" for unit in sorted(units - {*LEVELS})
    ]


def find_upward_imports(imports: Sequence[Import]) -> list[str]:
    return [str(found) for found in imports if not _goes_down(found)]


def _goes_down(found: Import) -> bool:
    importer, target = unit_of(found.importer), unit_of(found.target)
    if importer in ENTRIES:
        return target == importer or target in ENTRIES[importer]
    if target == "__init__":
        return set(found.names) == {"__version__"}  # any other public name is a way up in disguise
    if importer == target or importer not in LEVELS or target not in LEVELS:
        return True  # inside a package: find_sideways_imports; unlisted: find_unlisted
    return LEVELS[target] < LEVELS[importer] or (
        LEVELS[target] == LEVELS[importer] and LEVELS[target] in LEVELS_WITH_NEIGHBOURS
    )


def find_sideways_imports(imports: Sequence[Import]) -> list[str]:
    return [
        str(found)
        for found in imports
        if unit_of(found.importer) == unit_of(found.target)
        and unit_of(found.target) in PACKAGES_OF_STRANGERS
        and stranger_of(found.importer) != stranger_of(found.target)  # a stranger may be a package of its own
        and found.importer not in PACKAGES_OF_STRANGERS | ASSEMBLING_FILES  # a package's bare name is its __init__
        and stranger_of(found.target) not in SHARED_FILES
    ]


def stranger_of(module: str) -> str:
    """The file or package directly inside a package of strangers that a module belongs to."""
    return ".".join(module.split(".")[:2])


def find_cycle(imports: Sequence[Import]) -> list[str]:
    graph: dict[str, set[str]] = {}
    for found in imports:
        graph.setdefault(found.importer, set()).add(found.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as err:
        return list(reversed(err.args[1]))
    return []


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return read_sources()


@pytest.fixture(scope="module")
def imports(sources: dict[str, str]) -> list[Import]:
    return find_imports(sources)


def test_every_module_has_a_level(sources: dict[str, str]) -> None:
    assert find_unlisted(sources) == []


def test_imports_go_down(imports: list[Import]) -> None:
    assert find_upward_imports(imports) == []


def test_files_of_formats_integrations_and_cli_do_not_import_each_other(imports: list[Import]) -> None:
    assert find_sideways_imports(imports) == []


def test_there_is_no_import_cycle(imports: list[Import]) -> None:
    assert find_cycle(imports) == []


@pytest.mark.parametrize("module", ["llmtailor", "llmtailor.cli.main"])
def test_import_leaves_heavy_libraries_out(module: str) -> None:
    assert heavy_modules_after(f"import {module}") == []


def test_to_list_runs_no_format_is_imported() -> None:
    """``ls`` answers at once; of all formats it needs the manifest."""
    assert heavy_modules_after("import llmtailor.inventory", "llmtailor.catalog", "llmtailor.formats.tailored") == []


def heavy_modules_after(statement: str, *heavy: str) -> list[str]:
    modules = {"torch", "transformers", "numpy", *heavy}
    script = f"import sys\n{statement}\nprint(*sorted({modules} & sys.modules.keys()))"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.split()


# The checks themselves: each must see what it is there for.


def test_heavy_library_is_noticed() -> None:
    assert heavy_modules_after("import numpy") == ["numpy"]
    assert heavy_modules_after("import llmtailor.catalog", "llmtailor.catalog") == ["llmtailor.catalog"]


def test_unlisted_module_is_noticed() -> None:
    sentences = find_unlisted({"utils.py": "", "errors.py": "", "__init__.py": "", "cli/main.py": ""})
    assert sentences == ["utils has no level: add it to LEVELS in tests/test_architecture.py"]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("layers.py", "from .catalog import Catalog"),
        ("layers.py", "from . import catalog"),
        ("layers.py", "import llmtailor.catalog"),
        ("layers.py", "from llmtailor.catalog import Catalog"),
        ("layers.py", "try:\n    from .catalog import Catalog\nexcept ImportError:\n    pass"),
        ("layers.py", "if True:\n    pass\nelse:\n    from .catalog import Catalog"),
        ("layers.py", "class Layer:\n    from .catalog import Catalog"),
        ("formats/safetensors.py", "from ..checkpoint import open_checkpoint"),
        ("formats/__init__.py", "from ..checkpoint import open_checkpoint"),
        ("storage/local.py", "from ..formats import safetensors"),
        ("drift.py", "from .strategies import Strategy"),
        ("layers.py", "from llmtailor import Run"),
        ("layers.py", "import llmtailor"),
        ("__init__.py", "from .integrations.torch_loop import Run"),
    ],
)
def test_upward_import_is_noticed(path: str, text: str) -> None:
    assert len(find_upward_imports(find_imports({path: text, "catalog.py": "", "formats/safetensors.py": text}))) >= 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("catalog.py", "from .layers import LayerMap"),
        ("layers.py", "def build():\n    from .catalog import Catalog"),
        ("layers.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .catalog import Catalog"),
        ("layers.py", "from .schema import Schema"),
        ("manifest.py", "from . import __version__"),
        ("__init__.py", "from .errors import TailorError"),
        ("__main__.py", "from .cli.main import main"),
        ("formats/safetensors.py", "from safetensors import safe_open"),
    ],
)
def test_downward_import_is_allowed(path: str, text: str) -> None:
    found = find_imports({path: text, "catalog.py": "", "layers.py": text if path == "layers.py" else ""})
    assert find_upward_imports(found) == []
    assert find_sideways_imports(found) == []


@pytest.mark.parametrize(
    ("path", "text", "is_sideways"),
    [
        ("formats/dcp.py", "from .hf import open_hf", True),
        ("formats/dcp.py", "from . import hf", True),
        ("formats/dcp.py", "from .safetensors import parse_header", False),
        ("formats/deepspeed/reading.py", "from .partitions import locate", False),
        ("formats/deepspeed/reading.py", "from ..hf import open_hf", True),
        ("cli/show.py", "from llmtailor.cli import ls", True),
        ("cli/show.py", "from ._output import show_table", False),
        ("cli/main.py", "from . import ls", False),
        ("formats/__init__.py", "from .safetensors import parse_header", False),
        ("storage/local.py", "from .commit import publish", False),
    ],
)
def test_sideways_import_is_noticed(path: str, text: str, is_sideways: bool) -> None:
    others = {
        "formats/safetensors.py": "",
        "formats/hf.py": "",
        "formats/deepspeed/partitions.py": "",
        "cli/ls.py": "",
        "cli/_output.py": "",
        "storage/commit.py": "",
    }
    assert bool(find_sideways_imports(find_imports({path: text, **others}))) == is_sideways


def test_cycle_is_noticed() -> None:
    sources = {"plan.py": "from .verify import a", "verify.py": "from .diff import b", "diff.py": "from . import plan"}
    assert find_cycle(find_imports(sources)) == ["plan", "verify", "diff", "plan"]
