"""``parameters`` of mergekit's dialect: numbers, gradients over a slice, and filters on tensor names.

Source: mergekit 0.1, config.py (ConditionalParameter, evaluate_setting): a filter is a part of the tensor's name, or
``*``; a list of numbers is laid evenly over the slice; of the slice's layers the first is at 0 and the last at 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .reading import Reader
from .records import WeightRule
from .yaml_text import Item

__all__ = ["WEIGHT_FORM", "check_parameters", "parse_rules", "weight_at"]

WEIGHT_FORM = "a number, a list of numbers, or a list of {filter: TEXT, value: NUMBER}"
_SETTING_FORM = "a value, a list of values, or a list of {filter: TEXT, value: VALUE}"
_PARAMETERS_FORM = "parameters: {NAME: VALUE}"
_RULE_KEYS = ("value", "filter")
# Every rule may be asked for every tensor of every layer.
_MAX_RULES = 100


def check_parameters(item: Item, reader: Reader) -> Mapping[str, Item]:
    """The parameters of any method by name, each of a form that mergekit reads."""
    if not isinstance(item.value, Mapping):
        reader.refuse(item, "type", "expected a mapping of names to values", expected=_PARAMETERS_FORM)
        return {}
    for setting in item.value.values():
        _check_setting(setting, reader)
    return item.value


def _check_setting(setting: Item, reader: Reader) -> None:
    for entry in setting.value if isinstance(setting.value, tuple) else (setting,):
        if not isinstance(entry.value, Mapping):
            _check_values(entry, reader, may_be_list=False)
            continue
        parts = reader.fields(entry, _RULE_KEYS, required=["value"], form=_SETTING_FORM)
        if "value" in parts:
            _check_values(parts["value"], reader, may_be_list=True)
        if "filter" in parts:
            reader.text(parts["filter"], form="part of a tensor's name, or '*'")


def _check_values(item: Item, reader: Reader, *, may_be_list: bool) -> None:
    values = item.value if may_be_list and isinstance(item.value, tuple) else (item,)
    if not values or any(isinstance(each.value, Mapping | tuple | None) for each in values):
        reader.refuse(item, "type", "expected a value", expected=_SETTING_FORM)


def parse_rules(item: Item, reader: Reader) -> tuple[WeightRule, ...]:
    """A source's ``weight``: one number, a gradient, or rules with filters."""
    entries = item.value if isinstance(item.value, tuple) else (item,)
    if any(isinstance(each.value, Mapping) for each in entries):
        if len(entries) > _MAX_RULES:
            reader.refuse(item, "size", "too many filters", expected=f"at most {_MAX_RULES}")
            return ()
        return tuple(_parse_rule(each, reader) for each in entries)
    return (WeightRule(values=_parse_values(item, reader), filter=None),)


def _parse_rule(item: Item, reader: Reader) -> WeightRule:
    parts = reader.fields(item, _RULE_KEYS, required=["value"], form=WEIGHT_FORM)
    text = reader.text(parts["filter"], form="part of a tensor's name, or '*'") if "filter" in parts else "*"
    values = _parse_values(parts["value"], reader) if "value" in parts else (0.0,)
    return WeightRule(values=values, filter=None if text == "*" else text)


def _parse_values(item: Item, reader: Reader) -> tuple[float, ...]:
    if not isinstance(item.value, tuple):
        return (reader.number(item, form=WEIGHT_FORM),)
    return tuple(reader.number(each, form=WEIGHT_FORM) for each in reader.items(item, form=WEIGHT_FORM)) or (0.0,)


def weight_at(rules: Iterable[WeightRule], fqn: str, position: float) -> float | None:
    """What a source counts for a tensor.

    Args:
        rules: The first that holds decides.
        fqn: The tensor's name in the source.
        position: Of its layer in the slice: 0 for the first, 1 for the last.

    Returns:
        None if no rule holds.
    """
    for rule in rules:
        if rule.filter is None or rule.filter in fqn:
            return _interpolate(rule.values, position)
    return None


def _interpolate(values: tuple[float, ...], position: float) -> float:
    scaled = position * (len(values) - 1)
    below = min(int(scaled), len(values) - 1)
    above = min(below + 1, len(values) - 1)
    share = scaled - below
    return (1 - share) * values[below] + share * values[above]
