"""transformers is asked in this process, where it is loaded already; the tests of the command ask the real child."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest

from llmtailor.estimate import model
from llmtailor.formats.hf.model_process import describe_model


@lru_cache(maxsize=16)
def ask_here(text: bytes) -> dict[str, Any]:
    return {"version": "here", **describe_model(json.loads(text))}


@pytest.fixture(autouse=True)
def asked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "ask_transformers", ask_here)
