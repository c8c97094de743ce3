"""YAML from files nobody vouches for: the small part of it that recipes need, with the place of every value.

Values are built from the parser's events; PyYAML's composer, resolver and constructors, where anchors are followed and
tags become objects, are never run. Plain scalars mean what YAML 1.2 says, so ``no``, ``on``, ``1:30`` are text, and so
is ``0777``.

Source: YAML 1.2.2, section 10.3 (core schema), but for numbers with leading zeros, which YAML 1.1 reads as octal.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import yaml

from ..errors import InvalidInputError
from .faults import Faults, Place

__all__ = ["MAX_NBYTES", "Item", "Scalar", "parse_yaml"]

MAX_NBYTES = 256 * 1024
"""A recipe of 35 sources has 4 KiB."""
_MAX_DEPTH = 16
_MAX_DIGITS = 40

_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,60}")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
# Line ends and tabs are part of long texts; all else of the kind only hides something.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

Scalar: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A value and where it stands."""

    value: Scalar | tuple[Item, ...] | Mapping[str, Item]
    place: Place
    """Of the value itself."""
    key_place: Place
    """Of the value's key; of the value where it has none."""


@dataclass(slots=True, kw_only=True)
class _Frame:
    """A collection that has not ended."""

    place: Place
    key_place: Place
    is_mapping: bool
    listed: list[Item] = field(default_factory=list)
    mapped: dict[str, Item] = field(default_factory=dict)
    key: str | None = None
    """Whose value comes next."""
    key_mark: tuple[int, int] = (0, 0)


def parse_yaml(text: bytes, *, path: str) -> Item:
    """Parse one YAML document of plain values.

    Args:
        text: UTF-8, at most ``MAX_NBYTES``.
        path: Where it was read, for errors.

    Raises:
        InvalidInputError: Kinds ``yaml-size``, ``yaml-encoding``, ``yaml-syntax``, ``yaml-depth``, ``yaml-anchor``,
            ``yaml-tag``, ``yaml-merge-key``, ``yaml-directive``, ``yaml-documents``, ``yaml-key`` (not a text, or a
            duplicate), ``yaml-number``, ``yaml-text`` (control characters), or ``recipe-faults`` for several.
    """
    builder = _Builder(path)
    parser = _Parser(_decode(text, path), builder)
    root = parser.run()
    builder.faults.raise_any()
    return root


def _decode(text: bytes, path: str) -> str:
    def refuse(kind: str, what: str, *, expected: str, found: str | None = None, hint: str | None = None) -> Exception:
        return InvalidInputError(
            f"the recipe is wrong: {what}", kind=kind, path=path, expected=expected, found=found, hint=hint
        )

    if len(text) > MAX_NBYTES:
        raise refuse(
            "yaml-size",
            "it is too large",
            expected=f"at most {MAX_NBYTES:,} bytes",
            found=f"{len(text):,} bytes",
            hint="use the layers: dialect with ranges (layers.0-15)",
        )
    expected, hint = "UTF-8 without a byte order mark", "save the file as plain UTF-8 text"
    if text.startswith(b"\xef\xbb\xbf"):
        raise refuse("yaml-encoding", "it starts with a byte order mark", expected=expected, hint=hint)
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as err:
        line = text.count(b"\n", 0, err.start) + 1
        raise refuse("yaml-encoding", f"line {line} is not UTF-8", expected=expected, hint=hint) from err


class _Parser:
    """Drives PyYAML's parser, and makes its exceptions ours."""

    def __init__(self, text: str, builder: _Builder) -> None:
        self._text = text
        self._builder = builder
        self._loader: yaml.SafeLoader | None = None

    def run(self) -> Item:
        try:
            # Only its scanner and parser run: nothing but events is asked for.
            self._loader = yaml.SafeLoader(self._text)
            while self._loader.check_event():
                self._builder.take(self._loader.get_event())  # type: ignore[no-untyped-call]
        except InvalidInputError:
            raise  # ours is a ValueError, too
        except yaml.reader.ReaderError as err:
            before = self._text[: err.position]
            mark = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
            raise self._syntax_error("a character that YAML forbids", mark) from err
        except yaml.MarkedYAMLError as err:
            at = err.problem_mark or err.context_mark
            mark = (at.line + 1, at.column + 1) if at is not None else self._mark()
            raise self._syntax_error(" ".join(part for part in (err.context, err.problem) if part), mark) from err
        except (yaml.YAMLError, ValueError, OverflowError) as err:
            # PyYAML 6.0.3 calls chr() and int() on what an escape or a directive says.
            raise self._syntax_error(str(err), self._mark()) from err
        return self._builder.root()

    def _mark(self) -> tuple[int, int]:
        return (1, 1) if self._loader is None else (self._loader.line + 1, self._loader.column + 1)

    def _syntax_error(self, detail: str, mark: tuple[int, int]) -> InvalidInputError:
        place = Place(path=self._builder.path_here(), line=mark[0], column=mark[1])
        return InvalidInputError(
            f"the recipe is wrong at {place}: not YAML: {detail[:200]}",
            kind="yaml-syntax",
            path=self._builder.file,
            expected="YAML as in docs/recipes.md",
            hint="check indentation, brackets and quotes; a text that holds ': ' or ' #' needs quotes",
        )


class _Builder:
    """Makes items out of events; a stack, since a recipe must not choose how deep Python recurses."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.faults = Faults("the recipe is wrong", file)
        self._stack: list[_Frame] = []
        self._root: Item | None = None
        self._num_documents = 0

    def root(self) -> Item:
        if self._root is None:
            top = Place(path="$", line=1, column=1)
            return Item(value=None, place=top, key_place=top)
        return self._root

    def path_here(self) -> str:
        return self._next_path() if self._stack else "$"

    def take(self, event: yaml.Event) -> None:
        match event:
            case yaml.DocumentStartEvent():
                self._start_document(event)
            case yaml.AliasEvent():
                self._refuse_node("yaml-anchor", "an alias", event)
                self._take_scalar(event, "", is_plain=True)
            case yaml.ScalarEvent():
                self._check_node(event)
                self._take_scalar(event, event.value, is_plain=not event.style)
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                self._check_node(event)
                self._open(event, is_mapping=isinstance(event, yaml.MappingStartEvent))
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                frame = self._stack.pop()
                value = frame.mapped if frame.is_mapping else tuple(frame.listed)
                self._give(Item(value=value, place=frame.place, key_place=frame.key_place))
            case _:
                pass

    def _start_document(self, event: yaml.DocumentStartEvent) -> None:
        self._num_documents += 1
        place = self._place(event)
        if self._num_documents > 1:
            self.faults.add("yaml-documents", "a second document starts here", place=place, expected="one document")
            self.faults.raise_any()
        if event.version or event.tags:
            self.faults.add("yaml-directive", "a directive", place=place, expected="no line that starts with %")

    def _check_node(self, event: yaml.NodeEvent) -> None:
        if event.anchor is not None:
            self._refuse_node("yaml-anchor", "an anchor", event)
        if getattr(event, "tag", None) is not None:
            self._refuse_node("yaml-tag", "a tag", event)

    def _refuse_node(self, kind: str, what: str, event: yaml.Event) -> None:
        self.faults.add(
            kind,
            f"{what} is not allowed in a recipe",
            place=self._place(event),
            expected="plain values, each written where it is meant",
        )

    def _next_path(self) -> str:
        """Path of the value that comes next; of its mapping where a key does."""
        frame = self._stack[-1]
        if not frame.is_mapping:
            return f"{frame.place.path}[{len(frame.listed)}]"
        return frame.place.path if frame.key is None else _join(frame.place.path, frame.key)

    def _place(self, event: yaml.Event) -> Place:
        mark = event.start_mark
        assert mark is not None, event
        return Place(path=self.path_here(), line=mark.line + 1, column=mark.column + 1)

    def _key_place(self, place: Place) -> Place:
        frame = self._stack[-1] if self._stack else None
        if frame is None or frame.key is None:
            return place
        return Place(path=place.path, line=frame.key_mark[0], column=frame.key_mark[1])

    def _open(self, event: yaml.Event, *, is_mapping: bool) -> None:
        place = self._place(event)
        if len(self._stack) >= _MAX_DEPTH:
            self.faults.add(
                "yaml-depth", "nested too deeply", place=place, expected=f"at most {_MAX_DEPTH} lists and mappings"
            )
            self.faults.raise_any()
        if self._expects_key():
            self.faults.add("yaml-key", "a list or mapping as a key", place=place, expected="a text as key")
            self.faults.raise_any()
        self._stack.append(_Frame(place=place, key_place=self._key_place(place), is_mapping=is_mapping))

    def _expects_key(self) -> bool:
        return bool(self._stack) and self._stack[-1].is_mapping and self._stack[-1].key is None

    def _take_scalar(self, event: yaml.Event, text: str, *, is_plain: bool) -> None:
        place = self._place(event)
        if _CONTROL.search(text):
            self.faults.add(
                "yaml-text", "a text with a control character", place=place, expected="characters that can be seen"
            )
        if self._expects_key():
            self._take_key(text, place, is_plain=is_plain)
            return
        value = self._resolve(text, place) if is_plain else text
        self._give(Item(value=value, place=place, key_place=self._key_place(place)))

    def _take_key(self, text: str, place: Place, *, is_plain: bool) -> None:
        frame = self._stack[-1]
        if is_plain and text == "<<":
            self.faults.add("yaml-merge-key", "a merge key", place=place, expected="keys written where they are meant")
        elif is_plain and not isinstance(self._resolve(text, place), str):
            self.faults.add("yaml-key", "a key that is not a text", place=place, expected="a text", found=repr(text))
        elif text in frame.mapped:
            first = frame.mapped[text].key_place
            self.faults.add(
                "yaml-key",
                f"the key {text[:80]!r} stands here twice",
                place=place,
                expected="each key once",
                found=f"it is on line {first.line}, too",
            )
        frame.key, frame.key_mark = text, (place.line, place.column)

    def _resolve(self, text: str, place: Place) -> Scalar:
        """What a plain scalar means."""
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        is_int = _INT.fullmatch(text) is not None
        if not is_int and not _FLOAT.fullmatch(text) and not _NOT_FINITE.fullmatch(text):
            return text
        # Beyond that int() is slow or refuses.
        if len(text) > _MAX_DIGITS:
            self.faults.add("yaml-number", "a number of too many digits", place=place, expected="quotes, if it is text")
            return 0
        if is_int:
            return int(text, 0)
        if _NOT_FINITE.fullmatch(text) or not math.isfinite(number := float(text)):
            self.faults.add("yaml-number", "not a finite number", place=place, expected="a finite number", found=text)
            return 0.0
        return number

    def _give(self, item: Item) -> None:
        if not self._stack:
            self._root = item
            return
        frame = self._stack[-1]
        if not frame.is_mapping:
            frame.listed.append(item)
            return
        assert frame.key is not None, item.place
        frame.mapped.setdefault(frame.key, item)
        frame.key = None


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if _PLAIN_KEY.fullmatch(key) else f"{path}[{json.dumps(key[:100])}]"
