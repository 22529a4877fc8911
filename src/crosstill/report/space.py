"""The feature spaces of teacher and student in three dimensions, as in Figure 2 of DSMD.

One PCA is fitted on the points of both models together, so that neither is favoured and both
pictures have the same axes; they have the same limits and the same point of view, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from crosstill.report.pictures import Picture, Theme, picture
from crosstill.types import Features

MOST = 1000  # images, and as many captions, of each model
AXES = 3


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


def fit(features: Mapping[str, Features], most: int = MOST, seed: int = 0) -> Space:
    """Fit three axes to the features of all models; every model shows the same subset of rows."""
    draw = np.random.default_rng(seed)
    first = next(iter(features.values()))
    some = [_subset(len(side), most, draw) for side in first]
    points = {
        name: [_rows(side, chosen) for side, chosen in zip(rows, some, strict=True)]
        for name, rows in features.items()
    }
    stacked = np.concatenate([side for sides in points.values() for side in sides])
    count = min(AXES, *stacked.shape)
    pca = import_module("sklearn.decomposition").PCA(n_components=count, svd_solver="full")
    pca.fit(stacked)
    flat = {
        name: [_padded(pca.transform(side)) for side in sides] for name, sides in points.items()
    }
    everything = np.concatenate([side for sides in flat.values() for side in sides])
    return Space(
        {name: sides[0] for name, sides in flat.items()},
        {name: sides[1] for name, sides in flat.items()},
        np.stack([everything.min(0), everything.max(0)], axis=1),
        {name: _explained(points[name], flat[name]) for name in flat},
    )


def _subset(count: int, most: int, draw: np.random.Generator) -> np.ndarray:
    return np.sort(draw.choice(count, min(count, most), replace=False))


def _rows(side: Tensor, chosen: np.ndarray) -> np.ndarray:
    return side.numpy()[chosen].astype(np.float64)


def _padded(points: np.ndarray) -> np.ndarray:
    """Return (n, 3) also of features that have fewer dimensions."""
    return np.pad(points, ((0, 0), (0, AXES - points.shape[1])))


def _explained(points: list[np.ndarray], flat: list[np.ndarray]) -> float:
    whole = np.concatenate(points).var(axis=0).sum()
    return float(np.concatenate(flat).var(axis=0).sum() / whole) if whole else 1.0


def pictures(space: Space) -> list[Picture]:
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

    alt = (
        f"The space of the {name}: {len(images)} images and {len(captions)} captions of val on "
        f"three principal axes, which hold {share} of its variance. "
        f"{_apart(images, captions)}"
    )
    return picture(draw, alt, height=3.8, kind="png")


def _apart(images: np.ndarray, captions: np.ndarray) -> str:
    gap = float(np.linalg.norm(images.mean(0) - captions.mean(0)))
    return f"The middle of the images and that of the captions are {gap:.2f} apart."


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
