"""What reads a checkpoint must not be able to run code from it: calls that may not stand in src/."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE_ROOT = Path(__file__).parent.parent / "src" / "llmtailor"

_PICKLE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "joblib"}
_PICKLE_NAMES = {"load", "loads", "Unpickler"}
_OTHER_UNPICKLERS = {"shelve.open", "pandas.read_pickle", "torch.hub.load", "torch.jit.load"}
_YAML_LOADERS = {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"}
_EVALUATORS = {"eval", "exec", "builtins.eval", "builtins.exec"}
_SHELLS = {"os.system", "os.popen"}
_UNPACKERS = {"extractall", "unpack_archive"}
_WIDE_EXCEPTIONS = {"Exception", "BaseException"}


@dataclass(frozen=True)
class Call:
    """A call in the source, with the names of imports written out."""

    dotted: str
    """What is called: "torch.load" also for ``from torch import load as read; read(f)``."""
    node: ast.Call

    @property
    def module(self) -> str:
        return self.dotted.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.dotted.rpartition(".")[2]

    def is_keyword(self, name: str, *values: object) -> bool:
        """Whether the keyword is given, literally, one of the values."""
        return any(
            keyword.arg == name and isinstance(keyword.value, ast.Constant) and keyword.value.value in values
            for keyword in self.node.keywords
        )

    def has_keyword(self, name: str) -> bool:
        return any(keyword.arg == name for keyword in self.node.keywords)


@functools.cache
def _takers_of_weights_only() -> frozenset[str]:
    """Functions and records of the package that have an argument or a field of that name."""
    trees = (ast.parse(path.read_text(), str(path)) for path in SOURCE_ROOT.rglob("*.py"))
    return frozenset(
        node.name
        for tree in trees
        for node in ast.walk(tree)
        if (
            isinstance(node, ast.FunctionDef)
            and "weights_only" in {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)}
        )
        or (isinstance(node, ast.ClassDef) and any(_is_field(child, "weights_only") for child in node.body))
    )


def _is_field(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name


CALL_RULES: dict[str, Callable[[Call], bool]] = {
    "torch.load without weights_only=True": lambda call: (
        call.dotted in {"torch.load", "torch.serialization.load"} and not call.is_keyword("weights_only", True)
    ),
    # Ours of that name leave the optimizer out; whatever they hand on to torch.load falls under the rule above.
    "weights_only must be the literal True": lambda call: (
        call.has_keyword("weights_only")
        and not call.is_keyword("weights_only", True)
        and call.name not in _takers_of_weights_only()
    ),
    "unpickling": lambda call: (
        (call.module in _PICKLE_MODULES and call.name in _PICKLE_NAMES)
        or call.dotted in _OTHER_UNPICKLERS
        or (call.has_keyword("allow_pickle") and not call.is_keyword("allow_pickle", False))
    ),
    "yaml other than safe_load": lambda call: call.module == "yaml" and call.name in _YAML_LOADERS,
    "eval or exec": lambda call: call.dotted in _EVALUATORS,
    "a shell": lambda call: (
        call.dotted in _SHELLS or (call.has_keyword("shell") and not call.is_keyword("shell", False))
    ),
    "unpacking an archive unseen": lambda call: call.name in _UNPACKERS,
    "trust_remote_code": lambda call: (
        call.has_keyword("trust_remote_code") and not call.is_keyword("trust_remote_code", False)
    ),
}
HANDLER_RULE = "an exception swallowed"
SUPPRESS_RULE = "everything suppressed"


def find_unsafe(text: str, path: str = "source") -> list[str]:
    tree = ast.parse(text, path)
    imported = _imported_names(tree)
    return [f"{path}:{line}: {rule}" for line, rule in sorted(_faults(tree, imported))]


def _faults(tree: ast.Module, imported: dict[str, str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            call = Call(_dotted(node.func, imported), node)
            yield from ((node.lineno, rule) for rule, is_broken in CALL_RULES.items() if is_broken(call))
            if call.dotted == "contextlib.suppress" and any(_is_wide(argument) for argument in node.args):
                yield node.lineno, SUPPRESS_RULE
        elif isinstance(node, ast.ExceptHandler) and _swallows(node):
            yield node.lineno, HANDLER_RULE


def _imported_names(tree: ast.Module) -> dict[str, str]:
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return names


def _dotted(func: ast.expr, imported: dict[str, str]) -> str:
    if isinstance(func, ast.Attribute):
        return f"{_dotted(func.value, imported)}.{func.attr}"
    if isinstance(func, ast.Name):
        return imported.get(func.id, func.id)
    return "?"


def _swallows(handler: ast.ExceptHandler) -> bool:
    """A bare ``except:``, or one for any exception that does nothing."""
    if handler.type is None:
        return True
    return _is_wide(handler.type) and all(
        isinstance(node, ast.Pass | ast.Continue)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in handler.body
    )


def _is_wide(exception: ast.expr) -> bool:
    if isinstance(exception, ast.Tuple):
        return any(_is_wide(item) for item in exception.elts)
    return isinstance(exception, ast.Name) and exception.id in _WIDE_EXCEPTIONS


def test_source_has_no_unsafe_call() -> None:
    paths = sorted(SOURCE_ROOT.rglob("*.py"))
    assert paths
    assert [fault for path in paths for fault in find_unsafe(path.read_text(), path.name)] == []


# The gate itself: every rule is broken here at least once.

BROKEN = {
    "torch.load without weights_only=True": [
        "import torch\ntorch.load('a')",
        "import torch as t\nt.load('a')",
        "from torch import load\nload('a')",
        "from torch import load as read\nread('a', map_location='cpu')",
        "import torch\ntorch.load('a', weights_only=safe)",
    ],
    "weights_only must be the literal True": [
        "import torch\ntorch.load('a', weights_only=False)",
        "read_anything('a', weights_only=False)",
    ],
    "unpickling": [
        "import pickle\npickle.load(file)",
        "import pickle\npickle.loads(text)",
        "from pickle import loads\nloads(text)",
        "import pickle as p\np.Unpickler(file)",
        "import dill\ndill.loads(text)",
        "import numpy as np\nnp.load('a', allow_pickle=True)",
        "import torch\ntorch.jit.load('a')",
    ],
    "yaml other than safe_load": [
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import yaml\nyaml.unsafe_load(text)",
        "from yaml import full_load\nfull_load(text)",
    ],
    "eval or exec": ["eval(text)", "exec(text)", "import builtins\nbuiltins.exec(text)"],
    "a shell": [
        "import os\nos.system('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
    ],
    "unpacking an archive unseen": [
        "import tarfile\ntarfile.open('a').extractall('b')",
        "import shutil\nshutil.unpack_archive('a')",
        "from shutil import unpack_archive\nunpack_archive('a')",
    ],
    "trust_remote_code": [
        "AutoModel.from_pretrained('a', trust_remote_code=True)",
        "AutoModel.from_pretrained('a', trust_remote_code=trust)",
    ],
    HANDLER_RULE: [
        "try:\n    a()\nexcept:\n    raise",
        "try:\n    a()\nexcept Exception:\n    pass",
        "try:\n    a()\nexcept BaseException as err:\n    ...",
        "try:\n    a()\nexcept (ValueError, Exception):\n    pass",
        "for b in c:\n    try:\n        a()\n    except Exception:\n        continue",
    ],
    SUPPRESS_RULE: [
        "import contextlib\nwith contextlib.suppress(Exception):\n    a()",
        "from contextlib import suppress\nwith suppress(BaseException):\n    a()",
    ],
}


def test_every_rule_has_an_example() -> None:
    assert set(BROKEN) == {*CALL_RULES, HANDLER_RULE, SUPPRESS_RULE}


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, texts in BROKEN.items() for text in texts])
def test_unsafe_code_is_noticed(rule: str, text: str) -> None:
    assert any(fault.endswith(f": {rule}") for fault in find_unsafe(text))


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load('a', weights_only=True)",
        "import yaml\nyaml.safe_load(text)",
        "import json\njson.loads(text)",
        "import pickletools\npickletools.genops(text)",
        "import numpy\nnumpy.load('a', allow_pickle=False)",
        "model.eval()",
        "import subprocess\nsubprocess.run(['ls'])",
        "archive.extract(member)",
        "try:\n    a()\nexcept OSError:\n    pass",
        "try:\n    a()\nexcept Exception as err:\n    failures.append(err)",
        "import contextlib\nwith contextlib.suppress(FileNotFoundError):\n    a()",
    ],
)
def test_safe_code_passes(text: str) -> None:
    assert find_unsafe(text) == []
