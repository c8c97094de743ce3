"""mergekit's dialect, with LLMTailor's additions: layers by position in the target.

    slices:
      - sources: [{model: runs/a/checkpoint-100, layer_range: [0, 0]}]       zero-length: the norm's optimizer state
      - sources: [{model: runs/a/checkpoint-100, layer_range: [0, 16]}]
      - sources: [{model: runs/a/checkpoint-200, layer_range: [16, 32]}]
    post_weights: [{name: model.norm.weight, model: runs/a/checkpoint-100}]
    merge_method: passthrough
    dtype: bfloat16

What only mergekit itself can do (other methods, modules, merged vocabularies) is read, too, and named in
``needs_mergekit``, so that the caller can hand the file to it or refuse.

Source: mergekit 0.1, config.py (MergeConfiguration), tokenizer/config.py, merge_methods/{linear,passthrough}.py;
LLMTailor 0db721c, config.py (WeightSourceDefinition), examples/*_cut.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .faults import Faults, Place
from .named import DTYPES
from .reading import Reader
from .records import MergekitRecipe, ModelSource, Output, Slice, SliceSource, WeightRule, WeightSource
from .settings import check_parameters, parse_rules
from .yaml_text import Item

__all__ = ["MERGEKIT_KEYS", "parse_mergekit"]

MERGEKIT_KEYS = (
    "slices", "models", "modules", "merge_method", "base_model", "dtype", "out_dtype", "parameters",
    "tokenizer_source", "tokenizer", "chat_template", "pre_weights", "post_weights",
)  # fmt: skip
_CONTENT_KEYS = ("slices", "models", "modules")
_SLICE_KEYS = ("sources", "base_model", "residual_weight", "parameters")
_SOURCE_KEYS = ("model", "layer_range", "parameters")
_MODEL_KEYS = ("model", "parameters")
_MODULE_KEYS = ("slices", "models", "parameters")
_TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")
_WEIGHT_KEYS = ("name", "model")
# Parameters of the methods that are done here; passthrough's scale is not, as it would leave the optimizer behind.
_OWN_PARAMETERS = {"linear": ("weight", "normalize"), "passthrough": ("scale",)}

_FORM = "slices: [...] (or models:), merge_method: passthrough"
_SLICE_FORM = "- sources: [{model: PATH, layer_range: [0, 16]}]"
_SOURCE_FORM = "{model: PATH, layer_range: [0, 16]}"
_MODEL_FORM = "- model: PATH, with parameters: {weight: 0.5} for merge_method linear"
_MODULE_FORM = "modules: {NAME: {slices: [...]}}"
_RANGE_FORM = "[FIRST, END], the end not included, as in [0, 16]"
_WEIGHT_FORM = "- {name: model.norm.weight, model: PATH}"
_TOKENIZER_FORM = "tokenizer: {source: base}"


def parse_mergekit(root: Item, *, path: str, faults: Faults) -> MergekitRecipe:
    """Parse a document of mergekit's dialect; what is wrong with it is added to ``faults``."""
    return _Parsing(Reader(faults)).run(root, path)


@dataclass(slots=True, kw_only=True)
class _Parameters:
    """What the ``parameters`` of one place say."""

    rules: tuple[WeightRule, ...] = ()
    normalize: bool | None = None


@dataclass(slots=True)
class _Parsing:
    """The pass over one document."""

    reader: Reader
    method: str = ""
    reasons: list[str] = field(default_factory=list)
    """What needs mergekit."""

    def run(self, root: Item, path: str) -> MergekitRecipe:
        entries = self.reader.fields(root, MERGEKIT_KEYS, required=["merge_method"], form=_FORM)
        self._check_content(root, entries)
        if "merge_method" in entries:
            self.method = self.reader.text(entries["merge_method"], form="merge_method: passthrough, or linear")
            if self.method and self.method not in _OWN_PARAMETERS:
                self.reasons.append(f"merge_method {self.method}")
        top = self._parameters(entries)
        slices = self._slices(entries["slices"], top) if "slices" in entries else ()
        models = self._models(entries["models"], top) if "models" in entries else ()
        modules = tuple(self._modules(entries["modules"], top)) if "modules" in entries else ()
        pre, post = (tuple(self._weights(entries, key)) for key in ("pre_weights", "post_weights"))
        return MergekitRecipe(
            path=path,
            method=self.method,
            slices=slices,
            models=models,
            modules=modules,
            normalize=top.normalize is not False,
            base_model=self.reader.path(entries["base_model"]) if "base_model" in entries else None,
            pre_weights=pre,
            post_weights=post,
            tokenizer=self._tokenizer(entries),
            output=Output(dtype=self._dtype(entries)),
            needs_mergekit=", ".join(dict.fromkeys(self.reasons)) or None,
        )

    def _check_content(self, root: Item, entries: Mapping[str, Item]) -> None:
        present = [key for key in _CONTENT_KEYS if key in entries]
        if len(present) != 1:
            found = " and ".join(present) or "none of them"
            self.reader.faults.add(
                "content",
                "expected exactly one of slices, models and modules",
                place=root.place,
                expected=_FORM,
                found=found,
            )

    def _parameters(self, entries: Mapping[str, Item], *, of_source: bool = False) -> _Parameters:
        if "parameters" not in entries:
            return _Parameters()
        found = check_parameters(entries["parameters"], self.reader)
        if self.method not in _OWN_PARAMETERS:
            return _Parameters()
        # Only a slice or the whole recipe can be normalized.
        known = [name for name in _OWN_PARAMETERS[self.method] if not of_source or name != "normalize"]
        for name, item in found.items():
            if name not in known:
                self.reader.faults.add(
                    "unknown-parameter",
                    f"merge_method {self.method} has no parameter {name[:80]!r} here",
                    place=item.key_place,
                    expected=", ".join(known),
                    hint=self.reader.faults.near(name, known),
                )
        if "scale" in found and self.method == "passthrough":
            self.reasons.append("parameter scale")
        is_linear = self.method == "linear"
        return _Parameters(
            rules=parse_rules(found["weight"], self.reader) if is_linear and "weight" in found else (),
            normalize=self.reader.truth(found["normalize"]) if is_linear and "normalize" in found else None,
        )

    def _slices(self, item: Item, top: _Parameters) -> tuple[Slice, ...]:
        return tuple(self._slice(each, top) for each in self.reader.items(item, form=_SLICE_FORM))

    def _slice(self, item: Item, top: _Parameters) -> Slice:
        entries = self.reader.fields(item, _SLICE_KEYS, required=["sources"], form=_SLICE_FORM)
        for key in ("base_model", "residual_weight"):
            if key in entries:
                self.reasons.append(f"{key} of a slice")
        own = self._parameters(entries)
        rules = own.rules + top.rules
        items = self.reader.items(entries["sources"], form=_SLICE_FORM) if "sources" in entries else ()
        sources = tuple(self._source(each, rules) for each in items)
        self._check_sources(items, sources)
        normalize = own.normalize if own.normalize is not None else top.normalize
        return Slice(
            # The stand-in for no sources is never used: a fault was noted.
            sources=sources or (SliceSource(model="", start=0, end=0, place=item.place),),
            normalize=normalize is not False,
            place=item.place,
        )

    def _source(self, item: Item, outer: tuple[WeightRule, ...]) -> SliceSource:
        entries = self.reader.fields(item, _SOURCE_KEYS, required=["model", "layer_range"], form=_SOURCE_FORM)
        start, end = self._range(entries["layer_range"]) if "layer_range" in entries else (0, 0)
        return SliceSource(
            model=self.reader.path(entries["model"]) if "model" in entries else "",
            start=start,
            end=end,
            rules=self._parameters(entries, of_source=True).rules + outer,
            place=entries["layer_range"].place if "layer_range" in entries else item.place,
        )

    def _range(self, item: Item) -> tuple[int, int]:
        if not isinstance(item.value, tuple) or len(item.value) != 2:
            self.reader.refuse(item, "layer-range", "expected a range of layers", expected=_RANGE_FORM)
            return 0, 0
        start, end = (self.reader.whole(each, form=_RANGE_FORM) for each in item.value)
        if end < start:
            self.reader.faults.add(
                "layer-range",
                "a range that ends before it starts",
                place=item.place,
                expected=f"[{end}, {start}]",
                found=f"[{start}, {end}]",
            )
        return start, end

    def _check_sources(self, items: tuple[Item, ...], sources: tuple[SliceSource, ...]) -> None:
        """Sources of one slice: as many as the method takes, equally long, each with its weight."""
        add = self.reader.faults.add
        if self.method == "passthrough" and len(sources) > 1:
            add(
                "one-source",
                "merge_method passthrough takes one source for each slice",
                place=items[1].place,
                expected="one source, or merge_method linear with weights",
                found=f"{len(sources)} sources",
            )
        for item, source in zip(items[1:], sources[1:], strict=True):
            if source.end - source.start != sources[0].end - sources[0].start:
                add(
                    "slice-lengths",
                    "the sources of a slice are not equally long",
                    place=source.place,
                    expected=f"{sources[0].end - sources[0].start} layers, as the first",
                    found=f"{source.end - source.start}",
                )
            if source.start == source.end and sources[0].start == sources[0].end:
                add(
                    "one-source",
                    "a range of no layers, which names an auxiliary layer, takes one source",
                    place=item.place,
                    expected="one source",
                )
        if self.method == "linear" and len(sources) > 1:
            self._check_weights(items, [source.rules for source in sources])

    def _check_weights(self, items: tuple[Item, ...], rules: list[tuple[WeightRule, ...]]) -> None:
        for item, own in zip(items, rules, strict=True):
            if all(rule.filter is not None for rule in own):
                self.reader.faults.add(
                    "missing-weight",
                    "merge_method linear needs a weight for every tensor of each source",
                    place=item.place,
                    expected="parameters: {weight: 0.5}",
                    found="no weight" if not own else "weights with filters, but none for the rest",
                )

    def _models(self, item: Item, top: _Parameters) -> tuple[ModelSource, ...]:
        items = self.reader.items(item, form=_MODEL_FORM)
        models = tuple(self._model(each, top.rules) for each in items)
        if self.method == "passthrough" and len(models) > 1:
            self.reader.faults.add(
                "one-source",
                "merge_method passthrough takes one model",
                place=items[1].place,
                expected="slices:, or merge_method linear with weights",
                found=f"{len(models)} models",
            )
        if self.method == "linear" and len(models) > 1:
            self._check_weights(items, [model.rules for model in models])
        return models

    def _model(self, item: Item, outer: tuple[WeightRule, ...]) -> ModelSource:
        entries = self.reader.fields(item, _MODEL_KEYS, required=["model"], form=_MODEL_FORM)
        return ModelSource(
            model=self.reader.path(entries["model"]) if "model" in entries else "",
            rules=self._parameters(entries, of_source=True).rules + outer,
            place=item.place,
        )

    def _modules(self, item: Item, top: _Parameters) -> Iterator[str]:
        """The checkpoints that modules name; the modules themselves are for mergekit."""
        self.reasons.append("modules")
        if not isinstance(item.value, Mapping) or not item.value:
            self.reader.refuse(item, "type", "expected a mapping of modules", expected=_MODULE_FORM)
            return
        for module in item.value.values():
            entries = self.reader.fields(module, _MODULE_KEYS, form=_MODULE_FORM)
            self._parameters(entries)
            if ("slices" in entries) == ("models" in entries):
                self.reader.faults.add(
                    "content", "expected slices or models", place=module.place, expected=_MODULE_FORM
                )
                continue
            if "slices" in entries:
                yield from (source.model for each in self._slices(entries["slices"], top) for source in each.sources)
            else:
                yield from (source.model for source in self._models(entries["models"], top))

    def _weights(self, entries: Mapping[str, Item], key: str) -> Iterator[WeightSource]:
        if key not in entries:
            return
        for item in self.reader.items(entries[key], form=_WEIGHT_FORM):
            parts = self.reader.fields(item, _WEIGHT_KEYS, required=_WEIGHT_KEYS, form=_WEIGHT_FORM)
            yield WeightSource(
                name=self.reader.text(parts["name"], form="a tensor's name") if "name" in parts else "",
                model=self.reader.path(parts["model"]) if "model" in parts else "",
                place=parts["name"].place if "name" in parts else item.place,
            )

    def _tokenizer(self, entries: Mapping[str, Item]) -> str | None:
        if "chat_template" in entries:
            self.reasons.append("chat_template")
            if not isinstance(entries["chat_template"].value, str):
                self.reader.refuse(entries["chat_template"], "type", "expected a text", expected="chat_template: auto")
        if "tokenizer" in entries and "tokenizer_source" in entries:
            self.reader.faults.add(
                "tokenizer",
                "both tokenizer and tokenizer_source",
                place=entries["tokenizer"].key_place,
                expected="one of them",
                found=_found_at(entries["tokenizer_source"].key_place),
            )
        source = entries.get("tokenizer_source")
        if "tokenizer" in entries:
            parts = self.reader.fields(entries["tokenizer"], _TOKENIZER_KEYS, form=_TOKENIZER_FORM)
            self.reasons.extend(f"tokenizer.{key}" for key in ("tokens", "pad_to_multiple_of") if key in parts)
            source = parts.get("source")
            if source is None:
                # mergekit's default there.
                self.reasons.append("tokenizer.source union")
        if source is None:
            return None
        text = self.reader.text(source, form="base, union, or the path of a checkpoint")
        if text == "union":
            self.reasons.append("tokenizer_source union")
            return None
        return text

    def _dtype(self, entries: Mapping[str, Item]) -> str | None:
        """What the weights are written as: ``out_dtype``, else ``dtype``, which mergekit computes in and writes."""
        dtypes: dict[str, str] = {}
        for key in ("dtype", "out_dtype"):
            if key not in entries:
                continue
            item = entries[key]
            text = item.value.removeprefix("torch.") if isinstance(item.value, str) else item.value
            plain = Item(value=text, place=item.place, key_place=item.key_place)
            dtypes[key] = DTYPES[self.reader.choice(plain, tuple(DTYPES))]
        return dtypes.get("out_dtype", dtypes.get("dtype"))


def _found_at(place: Place) -> str:
    return f"the other is on line {place.line}"
