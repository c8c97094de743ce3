"""The picture of a difference: layers by components, the relative difference of each as a colour."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..diff import Difference
from ..errors import InvalidInputError, UnsupportedError, WriteError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    _Values: TypeAlias = np.ndarray[Any, np.dtype[Any]]

__all__ = ["check_picture", "draw_heat_map"]

_FORMATS = (".png", ".svg")
_COLORS = "viridis"
_SAME_COLOR = "#e8e8e8"
_INFINITE_COLOR = "#b3261e"
# More values than this are not readable beside each other.
_MOST_LABELLED = 60
_DIGITS_NUMEL = 400


def check_picture(path: Path) -> None:
    """See to it that a picture can be drawn into a file, before hours are spent on what it shows.

    Raises:
        InvalidInputError: Its name does not end in .png or .svg, or its directory is not there.
        UnsupportedError: matplotlib is not installed.
    """
    if path.suffix.lower() not in _FORMATS:
        raise InvalidInputError(
            "pictures are not drawn in this format",
            kind="picture-format",
            path=path,
            expected="a name that ends in " + " or ".join(_FORMATS),
            found=path.suffix or "a name without an ending",
            hint=f"--plot {path.stem}.png",
        )
    if not path.parent.is_dir():
        raise InvalidInputError(
            "there is no directory for the picture",
            kind="picture-directory",
            path=path.parent,
            expected="a directory",
            found="a file" if path.parent.exists() else "nothing",
            hint="make it, or choose another name with --plot",
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError(
            "a picture needs matplotlib, which is not installed",
            kind="missing-extra",
            hint="pip install 'llmtailor[plot]'",
        )


def draw_heat_map(difference: Difference, path: Path) -> None:
    """Draw a difference into a PNG or SVG file. No display and no global state of matplotlib is touched.

    Grey is what is equal, red what is infinitely much or has NaN or infinities, white what is not there.

    Args:
        difference: What to draw.
        path: The file, as ``check_picture`` lets it pass; what was there is replaced.

    Raises:
        WriteError: The disk, a permission or a limit.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_rows, num_columns = len(difference.layers), max(1, len(difference.components))
    height = min(60.0, 2.2 + 0.28 * max(num_rows, 3))
    figure = Figure(figsize=(3.2 + 1.3 * num_columns, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    _draw(figure, figure.subplots(), difference)
    is_vector = path.suffix.lower() == ".svg"
    try:
        figure.savefig(path, format=path.suffix.lower()[1:], metadata={"Date": None} if is_vector else None)
    except OSError as err:
        raise WriteError(
            f"cannot write the picture: {err.strerror or err}", kind="picture", path=path, hint="choose another place"
        ) from err


def _draw(figure: Figure, axes: Axes, difference: Difference) -> None:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm

    values = _values_of(difference)
    for mask, color in ((values == 0, _SAME_COLOR), (np.isinf(values), _INFINITE_COLOR)):
        shown = np.where(mask, 0.0, np.nan)
        axes.imshow(np.ma.masked_invalid(shown), cmap=ListedColormap([color]), aspect="auto", interpolation="nearest")
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size:
        # One value alone has no range.
        norm = LogNorm(positive.min() / 1.01, positive.max() * 1.01)
        shown = np.ma.masked_where(~np.isfinite(values) | (values <= 0), values)
        image = axes.imshow(shown, cmap=colormaps[_COLORS], norm=norm, aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axes, label="relative L2 difference, |B - A| / |A|")
        _write_values(axes, values, norm)
    _label(axes, difference)


def _values_of(difference: Difference) -> _Values:
    """Relative differences, layers by components; NaN where there is nothing, infinity for what has such or NaN."""
    import numpy as np

    values = np.full((len(difference.layers), max(1, len(difference.components))), np.nan)
    for row, layer in enumerate(difference.layers):
        for column, name in enumerate(difference.components):
            distance = layer.find_distance(name)
            if distance is not None:
                is_sound = distance.is_equal or not distance.num_not_finite
                values[row, column] = distance.relative if is_sound else math.inf
    return values


def _write_values(axes: Axes, values: _Values, norm: Any) -> None:
    """Each value in its field, where there is room for it."""
    if values.size > _DIGITS_NUMEL:
        return
    for (row, column), value in _enumerate(values):
        if not value or not math.isfinite(value):
            continue
        is_dark = norm(value) < 0.6
        text = f"{value:.2g}"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if is_dark else "black")


def _enumerate(values: _Values) -> list[tuple[tuple[int, int], float]]:
    rows, columns = values.shape
    return [((row, column), float(values[row, column])) for row in range(rows) for column in range(columns)]


def _label(axes: Axes, difference: Difference) -> None:
    names = [layer.name for layer in difference.layers]
    stride = -(-len(names) // _MOST_LABELLED) if names else 1
    axes.set_yticks(range(0, len(names), stride), names[::stride], fontsize=8, parse_math=False)
    axes.set_xticks(
        range(len(difference.components)), difference.components, fontsize=8, rotation=30, ha="right", parse_math=False
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    sides = (f"{name}: {_describe(side.path, side.step)}" for name, side in (("A", difference.a), ("B", difference.b)))
    axes.set_title(
        "\n".join([*sides, "grey: equal; red: NaN, or of nothing"]), loc="left", fontsize=9, parse_math=False
    )


def _describe(path: Path, step: int | None) -> str:
    return path.name if step is None else f"{path.name}, step {step}"
