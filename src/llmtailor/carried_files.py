"""Which small files a new checkpoint gets, and from which source each.

    training state       ``state_from``
    tokenizer            what the recipe names, else ``base``
    everything else      ``base``: configuration, model card
    others' weights      nobody: they are those of one source, and not the merged layers

What a file is, its name says (``formats.small_names``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from .catalog import Catalog, SmallFile
from .errors import FormatError
from .formats.hf.json_files import read_json_object
from .formats.hf.small_names import is_carried
from .formats.small_names import is_tokenizer, is_training_state, is_weights

__all__ = ["PROVENANCE_NAME", "choose_files", "drop_training_state", "fit_small_files", "note_left_out"]

PROVENANCE_NAME = "llmtailor_merge.json"
"""Says what a checkpoint was merged from, for people; of the last merge only."""

_PROGRESS_NAME = "run_state.json"
# Says what the weights are called, too.
_NAMES_OF_STATE_DICT = "dcp/names.json"
_ONE_PROCESS = frozenset({"tailored", "hf"})
_OF_RANK = re.compile(r"_\d+$")
_RNG_OF_RANK = re.compile(r"rng_state_(\d+)\.pth")


def choose_files(
    base: Catalog, state_from: Catalog, tokenizer: Sequence[SmallFile] | None, *, is_whole: bool
) -> tuple[SmallFile, ...]:
    """The small files of a merged checkpoint.

    Args:
        base: Whose configuration is taken.
        state_from: Whose training state is taken.
        tokenizer: Its files, among others; None for those of ``base``.
        is_whole: Every layer is that of ``base`` as it was: weights as others read them hold what the layers do.
    """
    tokenizer = base.files if tokenizer is None else tokenizer
    chosen = [
        *(file for file in state_from.files if is_training_state(file.name)),
        *(file for file in base.files if _is_of_model(file.name) and (is_whole or not is_weights(file.name))),
        *(file for file in tokenizer if is_tokenizer(file.name)),
    ]
    files = {file.name: file for file in chosen if file.name != PROVENANCE_NAME}
    return tuple(files[name] for name in sorted(files))


def _is_of_model(name: str) -> bool:
    return not is_training_state(name) and not is_tokenizer(name)


def drop_training_state(files: Sequence[SmallFile]) -> tuple[SmallFile, ...]:
    """The files without those that belong to a moment of training."""
    return tuple(file for file in files if not is_training_state(file.name) or file.name == _NAMES_OF_STATE_DICT)


def note_left_out(base: Catalog, merged: Catalog) -> Iterator[str]:
    """Sentences about others' weights that the new checkpoint does not have."""
    kept = {file.name for file in merged.files}
    lost = [file.name for file in base.files if is_weights(file.name) and file.name not in kept]
    if lost:
        yield (
            f"{', '.join(lost)} of base {'is' if len(lost) == 1 else 'are'} left out: not the merged layers, which "
            "training resumes from; PEFT's own readers find no adapter"
        )


def fit_small_files(catalog: Catalog, to: str) -> tuple[Catalog, tuple[str, ...]]:
    """Name the random number generators' files as the target looks for them, if that is of another format.

    What says of which objects there is state goes along only with the state of them all.

    Source: transformers 5.23, trainer.py (_load_rng_state): ``rng_state.pth`` of a single process, else
    ``rng_state_<rank>.pth``.
    """
    files = list(catalog.files)
    notes: list[str] = []
    if catalog.format != to and (catalog.format in _ONE_PROCESS) != (to in _ONE_PROCESS):
        files, notes = _rename_rng(files, to)
    lost = _lost_objects(files, is_carried if to == "hf" else lambda name: True)
    if lost:
        files = [file for file in files if file.name != _PROGRESS_NAME]
        notes.append(
            f"{_PROGRESS_NAME} is left out, as the state of {', '.join(map(repr, lost))} is not there: Run does not "
            "resume from the result"
        )
    return replace(catalog, files=tuple(files)), tuple(notes)


def _rename_rng(files: Sequence[SmallFile], to: str) -> tuple[list[SmallFile], list[str]]:
    old, new = ("rng_state_0.pth", "rng_state.pth") if to in _ONE_PROCESS else ("rng_state.pth", "rng_state_0.pth")
    ranks = sorted(file.name for file in files if _RNG_OF_RANK.fullmatch(file.name))
    kept = [
        replace(file, name=new) if file.name == old else file
        for file in files
        if file.name == old or (file.name != "latest" and not _RNG_OF_RANK.fullmatch(file.name))
    ]
    notes = []
    if to in _ONE_PROCESS and len(ranks) > 1:
        notes.append(f"the random state is that of rank 0 of {len(ranks)}")
    elif to not in _ONE_PROCESS and any(file.name == new for file in kept):
        notes.append("the random state of the single process goes to rank 0; other ranks start with their seed")
    return kept, notes


def _lost_objects(files: Sequence[SmallFile], is_written: Callable[[str], bool]) -> list[str]:
    """Objects that a plain loop saved, and whose files are not there."""
    progress = next((file for file in files if file.name == _PROGRESS_NAME), None)
    if progress is None:
        return []
    try:
        objects = read_json_object(progress.path, what=_PROGRESS_NAME).get("objects")
    except FormatError:
        objects = None  # not ours: another program's file of that name is copied as it is
    named = [each for each in objects if isinstance(each, str)] if isinstance(objects, list) else []
    stems = {file.name.removesuffix(".pt") for file in files if file.name.endswith(".pt") and is_written(file.name)}
    return sorted({*named} - stems - {_OF_RANK.sub("", stem) for stem in stems})
