"""Pictures as data URIs, each drawn for light pages and for dark ones; feature spaces in 3D.

A picture is drawn at the width of a phone; pages lay several side by side where there is room,
so letters keep their size everywhere. The feature spaces are those of Figure 2 of DSMD.
"""

import base64
import io
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, MaxNLocator, NullLocator

from crosstill.types import Features

WIDTH = 4.0  # inches; 96 CSS pixels each
MOST = 1000  # images, and as many captions, of each model in a picture of a space
AXES = 3
_DPI = 200  # of bitmaps: sharp on a phone
_TICKS = 6  # labels on a log axis, at most


@dataclass(frozen=True)
class Theme:
    """Colours that read well on one kind of page."""

    page: str
    ink: str
    faint: str
    lines: tuple[str, ...]

    def line(self, number: int) -> str:
        return self.lines[number % len(self.lines)]

    def dash(self, number: int) -> str:
        """Return a second sign beside the colour, for readers who cannot tell colours apart."""
        return ("-", "--", "-.", ":")[number % 4]


LIGHT = Theme(
    "#ffffff",
    "#1f2430",
    "#c3c8d2",
    ("#1f6fb2", "#c2410c", "#15803d", "#7c3aed", "#a16207", "#0e7490", "#be185d", "#4b5563"),
)
DARK = Theme(
    "#171a21",
    "#e6e8ee",
    "#4b5263",
    ("#6cb6ff", "#ff9b6a", "#5fd38d", "#c4a7ff", "#f2c14e", "#56d4dd", "#ff8fc0", "#aeb6c5"),
)


@dataclass(frozen=True)
class Picture:
    """One picture in both colours; `width` and `height` in CSS pixels, `alt` in words."""

    light: str
    dark: str
    alt: str
    width: int
    height: int


def picture(
    draw: Callable[[Figure, Theme], None], alt: str, height: float = 2.5, kind: str = "svg"
) -> Picture:
    """Draw twice.

    Args:
        draw: puts everything into an empty figure.
        alt: what the picture says to those who cannot see it.
        height: inches.
        kind: "svg" or "png".
    """
    light, dark = (_uri(draw, theme, height, kind) for theme in (LIGHT, DARK))
    return Picture(light, dark, alt, round(WIDTH * 96), round(height * 96))


def _uri(draw: Callable[[Figure, Theme], None], theme: Theme, height: float, kind: str) -> str:
    out = io.BytesIO()
    nothing = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(_style(theme)), warnings.catch_warnings():
        # a name in a script that the font lacks shows boxes, and the page has it in letters
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure, theme)
        figure.savefig(out, format=kind, dpi=_DPI, metadata=nothing)
    media = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{media};base64,{base64.b64encode(out.getvalue()).decode()}"


def _style(theme: Theme) -> dict[Any, Any]:
    inks = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
    faint = ("axes.edgecolor", "grid.color", "xtick.color", "ytick.color")
    papers = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    return {
        **dict.fromkeys(inks, theme.ink),
        **dict.fromkeys(faint, theme.faint),
        **dict.fromkeys(papers, theme.page),
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.linewidth": 0.5,
        "lines.linewidth": 1.6,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "text.parse_math": False,  # a $ in a name is a $
        "svg.hashsalt": "crosstill",  # equal figures give equal bytes
    }


def scale(axes: Axes, low: float, high: float, log: bool) -> None:
    """Set limits and labels of the y axis for values from `low` to `high`."""
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
        margin = (high / low) ** 0.06 if high > low else 1.05
        axes.set_ylim(low / margin, high * margin)
        axes.yaxis.set_major_locator(_ticks(low / margin, high * margin))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
        space = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - space, high + space)
    axes.yaxis.set_major_formatter(FuncFormatter(partial(_label, digits=_digits(low, high))))


def _digits(low: float, high: float) -> int:
    """Choose the significant digits that keep the labels of a narrow range apart."""
    span, size = high - low, max(abs(low), abs(high))
    return 4 if not span else min(12, max(4, 2 + math.ceil(math.log10(size / span))))


def _label(value: float, position: int | None = None, *, digits: int) -> str:
    return f"{value:.{digits}g}"


def _ticks(low: float, high: float) -> Locator:
    """Choose few round numbers for a log axis, but two at least."""
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for within in ((1, 2, 5), (1, 3), (1,)):
        ticks = [k * 10.0**ten for ten in tens for k in within if low <= k * 10.0**ten <= high]
        if len(ticks) <= _TICKS:
            break
    return (
        FixedLocator(ticks[:: math.ceil(len(ticks) / _TICKS)]) if len(ticks) > 1 else MaxNLocator(4)
    )


@dataclass(frozen=True)
class Space:
    """Points on three shared axes.

    Attributes:
        images: model → (n, 3).
        captions: model → (m, 3).
        limits: (3, 2), the least and the greatest of all points along each axis.
        explained: model → the share of its own variance that the three axes hold, 0 to 1.
    """

    images: dict[str, np.ndarray]
    captions: dict[str, np.ndarray]
    limits: np.ndarray
    explained: dict[str, float]


def fit_space(features: Mapping[str, Features], most: int = MOST, seed: int = 0) -> Space:
    """Fit three axes to the features of all models; every model shows the same subset of rows.

    One PCA is fitted on the points of all models together, so that none is favoured and their
    pictures have the same axes; they have the same limits and the same point of view, too.
    """
    draw = np.random.default_rng(seed)
    first = next(iter(features.values()))
    some = [np.sort(draw.choice(len(side), min(len(side), most), replace=False)) for side in first]
    points = {
        name: [
            side.numpy()[chosen].astype(np.float64) for side, chosen in zip(rows, some, strict=True)
        ]
        for name, rows in features.items()
    }
    stacked = np.concatenate([side for sides in points.values() for side in sides])
    count = min(AXES, *stacked.shape)
    pca = import_module("sklearn.decomposition").PCA(n_components=count, svd_solver="full")
    pca.fit(stacked)
    missing = ((0, 0), (0, AXES - count))  # axes of features that have fewer dimensions
    flat = {
        name: [np.pad(pca.transform(side), missing) for side in sides]
        for name, sides in points.items()
    }
    everything = np.concatenate([side for sides in flat.values() for side in sides])
    return Space(
        {name: sides[0] for name, sides in flat.items()},
        {name: sides[1] for name, sides in flat.items()},
        np.stack([everything.min(0), everything.max(0)], axis=1),
        {name: _explained(points[name], flat[name]) for name in flat},
    )


def _explained(points: list[np.ndarray], flat: list[np.ndarray]) -> float:
    whole = np.concatenate(points).var(axis=0).sum()
    return float(np.concatenate(flat).var(axis=0).sum() / whole) if whole else 1.0


def draw_spaces(space: Space) -> list[Picture]:
    """Draw a picture of each model's space."""
    return [_picture(space, name) for name in space.images]


def _picture(space: Space, name: str) -> Picture:
    images, captions = space.images[name], space.captions[name]
    share = f"{space.explained[name]:.0%}"

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.add_subplot(projection="3d")
        axes.set_title(f"{name}, {share} of its variance shown")
        for points, mark, number, label in (
            (images, "o", 0, "image"),
            (captions, "^", 1, "caption"),
        ):
            axes.scatter(
                *points.T, marker=mark, s=7, color=theme.line(number), alpha=0.6, linewidths=0,
                depthshade=False, label=label,
            )  # fmt: skip
        _frame(axes, space.limits, theme)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, markerscale=2.5)

    gap = float(np.linalg.norm(images.mean(0) - captions.mean(0)))
    alt = (
        f"The space of the {name}: {len(images)} images and {len(captions)} captions of val on "
        f"three principal axes, which hold {share} of its variance. "
        f"The middle of the images and that of the captions are {gap:.2f} apart."
    )
    return picture(draw, alt, height=3.8, kind="png")


def _frame(axes: object, limits: np.ndarray, theme: Theme) -> None:
    """Draw the same box for every model."""
    for letter, (low, high) in zip("xyz", limits, strict=True):
        room = 0.03 * (high - low) or 0.1
        getattr(axes, f"set_{letter}lim")(low - room, high + room)
        axis = getattr(axes, f"{letter}axis")
        axis.set_major_locator(MaxNLocator(4))
        axis.set_pane_color(theme.page)
        axis.set_tick_params(labelsize=8, pad=-1)
        getattr(axes, f"set_{letter}label")(f"axis {'xyz'.index(letter) + 1}", labelpad=-4)
    axes.view_init(elev=18, azim=-58)  # type: ignore[attr-defined]
