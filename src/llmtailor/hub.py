"""A source as a recipe names it: a directory, or a model of the Hugging Face hub.

``org/model`` and ``org/model@<branch or tag>`` stand for what the local cache has of it, as transformers left it there;
``org/model@<commit>`` is also downloaded if need be. Only a full commit is: what a branch points to can change between
two runs of one recipe.
"""

from __future__ import annotations

import re
from pathlib import Path

from .errors import NotFoundError, UnsupportedError

__all__ = ["locate_source"]

# Source: huggingface_hub 2.4, utils/_validators.py (REPO_ID_REGEX), narrowed to names with an owner.
_NAME = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
_MODEL = re.compile(rf"({_NAME})(?:@([\w./-]{{1,200}}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Source: mergekit 0.1, common.py (ModelReference.parse, ModelPath.parse): ``model[@revision]+lora[@revision]``.
_ADAPTED = re.compile(rf"{_MODEL.pattern}\+.+")
# Data alone: no programs, no pickles.
_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def locate_source(name: str) -> Path:
    """The directory that a source is in.

    Args:
        name: A path, ``org/model`` or ``org/model@<revision>``; a directory of that name comes first.

    Raises:
        NotFoundError: There is no such directory, and the cache or the hub has no such model.
        UnsupportedError: huggingface_hub is not installed, or an adapter is to be applied to the model.
    """
    path = Path(name)
    match = _MODEL.fullmatch(name)
    if path.exists():
        return path
    if _ADAPTED.fullmatch(name):
        raise UnsupportedError(
            "there is no such directory, and adapters are not applied to a model",
            kind="adapted-source",
            path=name,
            expected="a directory, or org/model",
            hint="check the path; or apply the adapter with PEFT (merge_and_unload), save that, and name its directory",
        )
    if match is None:
        return path
    repository, revision = match.groups()
    can_move = revision is None or _COMMIT.fullmatch(revision) is None
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as err:
        raise UnsupportedError(
            "there is no such directory, and models of the hub need huggingface_hub",
            kind="needs-hub",
            path=name,
            hint="pip install huggingface_hub, or check the path",
        ) from err
    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(_PATTERNS), local_files_only=can_move)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as err:
        where = "the local cache" if can_move else "the hub"
        said = str(err).splitlines()[0] if str(err) else type(err).__name__
        raise NotFoundError(
            f"there is no such directory, and {where} has no such model",
            kind="missing-checkpoint",
            path=name,
            expected="a directory, a model of the local cache, or org/model@<commit> to download it",
            # Of the local cache huggingface_hub speaks in arguments of its own.
            found="nothing" if can_move else said,
            hint="check the path; relative ones start at the current directory",
        ) from err
