"""Where the files of a DeepSpeed checkpoint are, and whether all of them are there.

    checkpoint-8/latest                                  "global_step8", the tag
    checkpoint-8/global_step8/[bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt      each rank
    checkpoint-8/global_step8/mp_rank_00_model_states.pt                              stages 1 and 2
    checkpoint-8/global_step8/zero_pp_rank_<r>_mp_rank_00_model_states.pt             stage 3, each rank

Source: DeepSpeed 0.19.8, runtime/engine.py (_get_zero_ckpt_prefix, _get_rank_zero_ckpt_name, _get_ckpt_name,
_get_all_zero_checkpoint_names for the old pattern, _get_expert_ckpt_name, _get_optimizer_ckpt_name).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import FormatError, IncompatibleError, IncompleteError, NotFoundError, UnsupportedError
from ..source_files import open_source, resolve_source

__all__ = ["LATEST_NAME", "Place", "RankFiles", "find_place", "find_rank_files", "model_name", "optim_name"]

LATEST_NAME = "latest"

_OPTIM = re.compile(r"(?P<bf16>bf16_)?zero_pp_rank_(?P<rank>\d{1,6})_mp_rank_(?P<tp>\d+)_?optim_states\.pt")
_MODEL = re.compile(r"mp_rank_(?P<tp>\d+)_model_states\.pt")
_MODEL_OF_RANK = re.compile(r"zero_pp_rank_(?P<rank>\d{1,6})_mp_rank_(?P<tp>\d+)_model_states\.pt")
_EXPERTS = re.compile(r"(layer_\d+_)?expert_\d+_mp_rank_.*|expp_rank_.*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,200}")
_MAX_LATEST_NBYTES = 512
_MAX_RANKS = 100_000


def optim_name(rank: int, *, has_bf16_name: bool) -> str:
    """Name of a rank's file of optimizer states."""
    return f"{'bf16_' if has_bf16_name else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def model_name(rank: int, stage: int) -> str:
    """Name of a file of model states; below stage 3 there is that of rank 0 only."""
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A checkpoint's directories."""

    root: Path
    """What the user named."""
    tag_dir: Path
    """Where the ranks' files are."""
    tag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFiles:
    """The files of a tag directory."""

    optim: Mapping[int, Path]
    """By rank."""
    has_bf16_name: bool
    model: Path | None
    model_of_rank: Mapping[int, Path]

    def require(self, ranks: int, stage: int, tag_dir: Path) -> None:
        """Check that the files of all ranks are there, and no others.

        Raises:
            IncompleteError: Some are missing; names each.
            IncompatibleError: There are files of more ranks.
        """
        if not 0 < ranks <= _MAX_RANKS:
            raise FormatError(
                "not a number of ranks", kind="ranks", path=tag_dir, expected=f"1 to {_MAX_RANKS}", found=ranks
            )
        wanted = [(self.optim, optim_name(rank, has_bf16_name=self.has_bf16_name), rank) for rank in range(ranks)]
        if stage == 3:
            wanted += [(self.model_of_rank, model_name(rank, stage), rank) for rank in range(ranks)]
        missing = [name for found, name, rank in wanted if rank not in found]
        if stage != 3 and self.model is None:
            missing.append(model_name(0, stage))
        if missing:
            raise _incomplete(tag_dir, missing, f"the files of {ranks} ranks")
        extra = [path.name for rank, path in sorted(self.optim.items()) if rank >= ranks]
        if extra:
            raise IncompatibleError(
                "there are files of more ranks than the checkpoint has",
                kind="extra-rank",
                path=tag_dir,
                expected=f"{ranks} ranks",
                found=", ".join(extra[:8]),
                hint="a checkpoint of a larger world was overwritten; remove the files that are older than the others",
            )


def _incomplete(tag_dir: Path, missing: list[str], expected: str) -> IncompleteError:
    more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
    return IncompleteError(
        f"{len(missing)} files of the checkpoint are missing",
        kind="missing-rank",
        path=tag_dir / missing[0],
        expected=expected,
        found=f"no {', '.join(missing[:8])}{more}",
        hint="collect the files of all nodes in one directory",
    )


def find_place(path: Path) -> Place:
    """Find the directory with the ranks' files.

    Args:
        path: ``checkpoint-N`` of the Trainer, what ``engine.save_checkpoint`` was given, or the directory of a tag.

    Raises:
        NotFoundError: There is none.
        FormatError: ``latest`` is not a tag, or leads out of the checkpoint.
        IncompatibleError: There are several, and nothing says which.
        UnsupportedError: It is a universal checkpoint.
    """
    names = _list_names(path)
    if any(_is_rank_file(name) for name in names):
        return Place(root=path, tag_dir=path, tag=path.resolve().name)
    if "latest_universal" in names and LATEST_NAME not in names:
        raise _universal(path)
    if LATEST_NAME in names:
        tag = _read_latest(path)
        if tag not in names:
            raise IncompleteError(
                f"{LATEST_NAME} names a directory that is not there",
                kind="missing-tag",
                path=path / tag,
                expected=f"the directory {tag}",
                found=", ".join(sorted(names)[:8]),
                hint="copy the checkpoint again",
            )
    else:
        tags = sorted(name for name in names if name.startswith("global_step") and (path / name).is_dir())
        if len(tags) != 1:
            raise _no_tag(path, tags, names)
        tag = tags[0]
    tag_dir = resolve_source(path / tag, path)
    return Place(root=path, tag_dir=tag_dir, tag=tag)


def _list_names(path: Path) -> set[str]:
    try:
        return {entry.name for entry in os.scandir(path)}
    except (FileNotFoundError, NotADirectoryError) as err:
        raise NotFoundError(
            "no such checkpoint",
            kind="missing-checkpoint",
            path=path,
            expected="a directory",
            found="a file" if path.exists() else "nothing",
            hint="check the path; relative ones start at the current directory",
        ) from err


def _is_rank_file(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (_OPTIM, _MODEL, _MODEL_OF_RANK))


def _read_latest(root: Path) -> str:
    path = resolve_source(root / LATEST_NAME, root)
    descriptor = open_source(path)
    try:
        data = os.read(descriptor, _MAX_LATEST_NBYTES)
    finally:
        os.close(descriptor)
    tag = data.decode("utf-8", errors="replace").strip()
    if not _TAG.fullmatch(tag):
        raise FormatError(
            f"{LATEST_NAME} does not name a directory of the checkpoint",
            kind="latest",
            path=path,
            expected="one plain name, such as global_step1000",
            found=ascii(tag[:80]),
        )
    return tag


def _no_tag(path: Path, tags: list[str], names: Iterable[str]) -> IncompatibleError | NotFoundError:
    if tags:
        return IncompatibleError(
            "there are several checkpoints here, and nothing says which is meant",
            kind="several-tags",
            path=path,
            expected=f"a file {LATEST_NAME}, or one directory global_step<N>",
            found=", ".join(tags[:8]),
            hint="name the directory global_step<N> itself",
        )
    return NotFoundError(
        "there is no DeepSpeed checkpoint here",
        kind="missing-tag",
        path=path,
        expected=f"a file {LATEST_NAME}, a directory global_step<N>, or files *_optim_states.pt",
        found=", ".join(sorted(names)[:8]) or "an empty directory",
        hint="the Trainer's checkpoint-<N> is such a directory",
    )


def _universal(path: Path) -> UnsupportedError:
    return UnsupportedError(
        "DeepSpeed's universal checkpoints are not read",
        kind="universal",
        path=path,
        expected="files *_optim_states.pt of each rank",
        hint="use the checkpoint from which ds_to_universal made it",
    )


def find_rank_files(tag_dir: Path) -> RankFiles:
    """List the files of a tag directory.

    Raises:
        NotFoundError: There are none.
        IncompleteError: There are no optimizer states.
        FormatError: A file leads out of the directory, or is there in two forms.
        UnsupportedError: Tensor or expert parallelism, or a universal checkpoint.
    """
    names = _list_names(tag_dir)
    optim: dict[int, Path] = {}
    model_of_rank: dict[int, Path] = {}
    model = None
    has_bf16_name = False
    for name in sorted(names):
        _require_plain(name, tag_dir)
        if found := _OPTIM.fullmatch(name):
            rank = int(found["rank"])
            if rank in optim:
                raise _twice(tag_dir, optim[rank].name, name)
            optim[rank] = resolve_source(tag_dir / name, tag_dir)
            has_bf16_name = has_bf16_name or found["bf16"] is not None
        elif _MODEL.fullmatch(name):
            model = resolve_source(tag_dir / name, tag_dir)
        elif found := _MODEL_OF_RANK.fullmatch(name):
            model_of_rank[int(found["rank"])] = resolve_source(tag_dir / name, tag_dir)
    if not optim:
        if "zero" in names:
            raise _universal(tag_dir)
        raise _incomplete(tag_dir, [optim_name(0, has_bf16_name=False)], "optimizer states of ZeRO stage 1, 2 or 3")
    return RankFiles(optim=optim, has_bf16_name=has_bf16_name, model=model, model_of_rank=model_of_rank)


def _require_plain(name: str, tag_dir: Path) -> None:
    parallel = None
    if _EXPERTS.fullmatch(name):
        parallel = "experts (MoE)"
    for pattern in (_OPTIM, _MODEL, _MODEL_OF_RANK):
        found = pattern.fullmatch(name)
        if found and int(found["tp"]):
            parallel = "tensors (mp_world_size > 1)"
    if parallel is not None:
        raise UnsupportedError(
            f"checkpoints with parallel {parallel} are not read",
            kind="model-parallel",
            path=tag_dir / name,
            expected="data parallelism with ZeRO alone",
            found=name,
            hint="gather the weights with the framework's own tools, and merge those",
        )


def _twice(tag_dir: Path, first: str, second: str) -> FormatError:
    return FormatError(
        "the optimizer states of a rank are there twice",
        kind="rank-twice",
        path=tag_dir,
        expected="one file for each rank",
        found=f"{first}, {second}",
        hint="two runs wrote into one directory; remove the files of one of them",
    )
