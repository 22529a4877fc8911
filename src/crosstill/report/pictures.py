"""Pictures as data URIs, each drawn for light pages and for dark ones.

A picture is drawn at the width of a phone; pages lay several side by side where there is room,
so letters keep their size everywhere.
"""

import base64
import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, MaxNLocator, NullLocator

WIDTH = 4.0  # inches; 96 CSS pixels each
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
        """A second sign beside the colour, for those who cannot tell colours apart."""
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
    """Limits and labels of the y axis for values from `low` to `high`."""
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
    """Significant digits that keep the labels of a narrow range apart."""
    span, size = high - low, max(abs(low), abs(high))
    return 4 if not span else min(12, max(4, 2 + math.ceil(math.log10(size / span))))


def _label(value: float, position: int | None = None, *, digits: int) -> str:
    return f"{value:.{digits}g}"


def _ticks(low: float, high: float) -> Locator:
    """Few round numbers on a log axis, but two at least."""
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for within in ((1, 2, 5), (1, 3), (1,)):
        ticks = [k * 10.0**ten for ten in tens for k in within if low <= k * 10.0**ten <= high]
        if len(ticks) <= _TICKS:
            break
    return (
        FixedLocator(ticks[:: math.ceil(len(ticks) / _TICKS)]) if len(ticks) > 1 else MaxNLocator(4)
    )
