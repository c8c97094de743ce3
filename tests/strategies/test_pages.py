"""What the documentation says of strategies is so: examples are read, arguments exist, plug-ins work."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from llmtailor import strategies
from llmtailor.errors import InvalidInputError
from llmtailor.layers import LayerKind
from llmtailor.strategies import Custom, Strategy, parse_strategy
from strategies.made_up_runs import context_of, make_blocks, make_layer

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(Path("docs/strategies").glob("*.md"))}
BUILT_IN = sorted(PAGES.keys() - {"index", "custom", "plugins"})
EXAMPLES = sorted(
    {
        found[2]
        for page, text in PAGES.items()
        if page != "plugins"
        for found in re.finditer(r"""strategy=(["'])(.*?)\1""", text)
    }
)


def test_every_built_in_strategy_has_a_page() -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_strategy("no_such_strategy")
    assert caught.value.expected == ", ".join(BUILT_IN)


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_are_read(text: str) -> None:
    assert isinstance(parse_strategy(text), Strategy)


def shown(default: object) -> str:
    """A default as the pages show it."""
    if default is dataclasses.MISSING:
        return "has to be given"
    if default is None:
        return "none needed"
    return f"{default:g}".replace("e-0", "e-") if isinstance(default, float) else str(default)


@pytest.mark.parametrize("name", BUILT_IN)
def test_pages_tell_every_argument_and_its_default(name: str) -> None:
    told: dict[str, str] = {}
    for arguments, defaults in re.findall(r"^\| (`.*?) \|.*\| (.*?) \|$", PAGES[name], re.MULTILINE):
        told |= zip(re.findall(r"`(\w+)`", arguments), re.sub('[`"]', "", defaults).split(", "), strict=True)
    strategy = getattr(strategies, name.title().replace("_", ""))
    assert told == {field.name: shown(field.default) for field in dataclasses.fields(strategy)}


def code_of(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL))


def test_function_of_the_page_chooses_layers() -> None:
    function = code_of("custom").partition("run =")[0]
    scope: dict[str, object] = {}
    exec(function, scope)
    layers = (*make_blocks(None), make_layer("lm_head", LayerKind.HEAD))
    strategy = Custom(scope["choose"])  # type: ignore[arg-type]
    assert strategy.select(context_of(layers, step=100)) == {"lm_head"}
    assert strategy.select(context_of(layers, step=1000)) == {"lm_head", "layers.0"}


def test_plugin_of_the_page_is_a_strategy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    project = tomllib.loads(re.findall(r"```toml\n(.*?)```", PAGES["plugins"], re.DOTALL)[0])["project"]
    ((group, points),) = project["entry-points"].items()
    lines = [f"[{group}]", *map(" = ".join, points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/strategies.py").write_text(code_of("plugins"))
    monkeypatch.syspath_prepend(tmp_path)
    strategy = parse_strategy("smallest(k=1)")
    assert strategy.select(context_of(make_blocks(None, None, nbytes=[3, 2]))) == {"layers.1"}
    assert parse_strategy(strategy.text) == strategy
