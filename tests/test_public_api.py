"""The surface people import: complete, sorted, and stated in one place."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import llmtailor
from llmtailor import errors

ROOT = Path(__file__).parent.parent


def test_all_is_sorted() -> None:
    assert llmtailor.__all__ == sorted(set(llmtailor.__all__))


def test_all_names_every_lazy_name() -> None:
    assert set(llmtailor._LAZY) <= set(llmtailor.__all__)


@pytest.mark.parametrize("name", llmtailor.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(llmtailor, name) is not None
    assert name in dir(llmtailor)


def test_strategies_are_reached_by_the_package_alone() -> None:
    code = "import sys, llmtailor; assert 'torch' not in sys.modules; llmtailor.strategies.Budget('20GB')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert "strategies" in dir(llmtailor)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        llmtailor.nonsense  # noqa: B018


def test_version_is_the_one_in_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert llmtailor.__version__ == project["version"]


def test_troubleshooting_knows_every_error_and_warning() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert [name for name in errors.__all__ if f"`{name}`" not in page] == []
