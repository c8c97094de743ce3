"""Recipes: which layers of which checkpoints make a new one.

    bytes --parse_recipe--> Recipe --sources_of--> paths, which the caller opens
    Recipe + {path: SourceLayers} --resolve--> Resolution: for every layer of the target where it comes from
    saves --compose_recipe--> bytes of a recipe

Pure: nothing is opened here. Two dialects are read, mergekit's with LLMTailor's additions and our own; what both mean
is a ``Resolution``. A recipe is not trusted: see ``yaml_text``.
"""

from __future__ import annotations

from .compose import SavedLayers, choose_newest, compose_recipe
from .flags import FlaggedSave, encode_flags, flags_to_layers, layers_to_flags, read_flags
from .parsing import parse_recipe
from .records import (
    LayerChoice,
    MergekitRecipe,
    ModelSource,
    NamedRecipe,
    Output,
    Recipe,
    Slice,
    SliceSource,
    WeightSource,
    sources_of,
)
from .resolution import Contribution, Resolution, TargetLayer, whole_checkpoint
from .resolve import resolve
from .sources import SourceLayers
from .yaml_text import MAX_NBYTES

__all__ = [
    "MAX_NBYTES",
    "Contribution",
    "FlaggedSave",
    "LayerChoice",
    "MergekitRecipe",
    "ModelSource",
    "NamedRecipe",
    "Output",
    "Recipe",
    "Resolution",
    "SavedLayers",
    "Slice",
    "SliceSource",
    "SourceLayers",
    "TargetLayer",
    "WeightSource",
    "choose_newest",
    "compose_recipe",
    "encode_flags",
    "flags_to_layers",
    "layers_to_flags",
    "parse_recipe",
    "read_flags",
    "resolve",
    "sources_of",
    "whole_checkpoint",
]
