"""Intermediate layers of student and teacher, and photos with patches blanked out.

Most losses read embeddings, which a cache holds. A few read intermediate layers, for which a
teacher has to run beside the student, or the student's embeddings of damaged photos.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crosstill.cache import Cache, Split, pixels
from crosstill.errors import ConfigError, MismatchError, ModelError
from crosstill.models import open as open_model
from crosstill.objectives import Objective
from crosstill.students.student import Student
from crosstill.teachers.base import Teacher
from crosstill.train.batches import Picked
from crosstill.train.config import TrainConfig
from crosstill.types import Hidden

WORDS = ("first", "middle", "last")


class LayerTap:
    """Record outputs of some blocks of an image tower, as (B, C, H, W) maps, while it listens.

    Args:
        tower: its blocks are its longest list of modules.
        layers: "first", "middle", "last", or the number of a block from 0.

    Raises:
        ConfigError: the tower has no blocks, or not that many.
    """

    def __init__(self, tower: nn.Module, layers: Iterable[str]) -> None:
        blocks = max(
            (m for m in tower.modules() if isinstance(m, nn.ModuleList)), key=len, default=()
        )
        self._parts: dict[str, list[Tensor]] = {}
        self._listening = False
        for layer in sorted(set(layers)):
            self._parts[layer] = []
            block = blocks[_number(layer, len(blocks), type(tower).__name__)]
            block.register_forward_hook(self._keeper(layer))

    def listen(self) -> None:
        """Start to record."""
        self._listening = True
        for parts in self._parts.values():
            parts.clear()

    def take(self) -> Hidden:
        """Return the outputs since `listen`, in the order of their rows, and stop recording."""
        self._listening = False
        layers = {layer: torch.cat(parts) for layer, parts in self._parts.items()}
        for parts in self._parts.values():
            parts.clear()
        return Hidden(layers)

    def _keeper(self, layer: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._listening:
                self._parts[layer].append(
                    as_map(output[0] if isinstance(output, tuple) else output)
                )

        return keep


class PairedLayers:
    """A student's and a live teacher's layers for the same photos.

    Args:
        student: the student.
        source: the live teacher.
        cache: the cache that the teacher filled.
        split: of the photos.
        layers: which blocks, see `LayerTap`.

    Raises:
        MismatchError: the live teacher is not the one that filled the cache.
        ConfigError: a layer that one of them lacks.
    """

    def __init__(
        self, student: Student, source: str, cache: Cache, split: Split, layers: Iterable[str]
    ) -> None:
        self._teacher: Teacher = _open(source, cache)
        self._layers = sorted(set(layers))
        self._of_teacher = LayerTap(_image_tower(self._teacher), self._layers)
        self._photos = pixels(cache, split, self._teacher.preprocess)
        self.follow(student)

    def follow(self, student: Student) -> None:
        """Record the layers of this student from now on."""
        self._student = student
        self._of_student = LayerTap(student.image_tower, self._layers)

    def probe(self) -> tuple[Hidden, Hidden]:
        """Return both models' layers for one grey photo, from which losses learn the widths."""
        grey = torch.full((1, 3, *self._student.preprocess.size), 128, dtype=torch.uint8)
        self.listen()
        self._student.embed_images(grey)
        self._teacher.embed_images(self._photos.take(np.zeros(1, dtype=int)))
        return self._of_student.take(), self._of_teacher.take()

    def listen(self) -> None:
        """Start to record both models' layers."""
        self._of_student.listen()
        self._of_teacher.listen()

    def take(self, picked: Picked, views: int) -> tuple[Hidden, Hidden]:
        """Return the layers of a step's distinct photos, in one order.

        The student has just encoded them; the teacher does so now.
        """
        student_layers = self._of_student.take()
        distinct = torch.from_numpy(picked.images * views + picked.views).unique().numpy()
        self._teacher.embed_images(self._photos.take(distinct // views, distinct % views))
        return student_layers, self._of_teacher.take()


def pair(
    student: Student, losses: nn.ModuleDict, config: TrainConfig, cache: Cache
) -> PairedLayers | None:
    """Open the live teacher if a loss reads layers, and adapt those losses to the layers' widths.

    Raises:
        ConfigError: photos to be blanked for a tower without patches, or a layer that is missing.
        ModelError, MismatchError: no such teacher, or another than filled the cache.
    """
    masked = ", ".join(reading(losses, "masked"))
    if masked and patch_size(student) is None:
        tower = type(student.image_tower).__name__
        raise ConfigError(f"{masked}: blanks patches, and {tower} has none; use a ViT")
    readers = reading(losses, "hidden")
    if not readers:
        return None
    assert config.teacher is not None  # `check` has refused that
    layers = {layer for loss in readers.values() for layer in loss.reads.layers}
    paired = PairedLayers(student, config.teacher, cache, cache.split(config.train_split), layers)
    probed = paired.probe()
    for loss in readers.values():
        loss.adapt(*probed)
    return paired


def check(config: TrainConfig, losses: nn.ModuleDict, cache: Cache, world: int) -> None:
    """Refuse a run whose losses cannot see what they read.

    Raises:
        MismatchError: a loss reads layers and there is no live teacher.
        ConfigError: a setting under which nobody can look inside.
    """
    hidden, masked = reading(losses, "hidden"), reading(losses, "masked")
    names = ", ".join([*hidden, *masked])
    if hidden and config.teacher is None:
        raise MismatchError(
            f"{', '.join(hidden)}: reads intermediate layers, and {cache.folder} holds only what "
            f"the teacher said at the end; give --set teacher={_sources(cache)}"
        )
    in_the_way = {
        f"freeze = {config.freeze} (leave it out)": config.freeze in ("image", "both"),
        "chunk_size (leave it out)": config.chunk_size is not None,
        "compile (use false)": config.compile,
        "several processes (use one)": world > 1,
    }
    for what, true in in_the_way.items():
        if names and true:
            raise ConfigError(f"{names}: needs the image tower's whole pass; not with {what}")


def reading(losses: nn.ModuleDict, kind: str) -> dict[str, Objective]:
    """Return the losses that read one kind of `Input`, by name."""
    named: dict[str, Any] = dict(losses.items())
    return {name: loss for name, loss in named.items() if loss.reads.kind == kind}


def blank(photos: Tensor, patch: int, ratio: float, mean: Iterable[float]) -> Tensor:
    """Blank a share of the patches of photos (I, 3, H, W) uint8, drawn at random, in `mean`.

    The colour `mean` becomes 0 after normalisation.
    """
    count, _, height, width = photos.shape
    rows, columns = height // patch, width // patch
    hidden = torch.rand(count, rows * columns).argsort(1) < round(ratio * rows * columns)
    grid = hidden.view(count, 1, rows, columns).to(photos.device)
    # what does not fill a patch at the lower and right edge is not seen by a ViT either
    mask = grid.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    mask = nn.functional.pad(mask, (0, width - mask.shape[3], 0, height - mask.shape[2]))
    colour = torch.tensor([round(255 * m) for m in mean], dtype=torch.uint8, device=photos.device)
    return torch.where(mask, colour[:, None, None], photos)


def patch_size(student: Student) -> int | None:
    """Return the side of the image tower's patches in pixels; None for a tower without."""
    size = getattr(student.image_tower.config, "patch_size", None)
    return size if isinstance(size, int) else None


def as_map(output: Tensor) -> Tensor:
    """Return (B, C, H, W) from a map, or from (B, L, C) tokens with or without a class token."""
    if output.ndim == 4:
        return output
    side = math.isqrt(output.shape[1])
    tokens = output[:, output.shape[1] - side * side :]
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def _number(layer: str, count: int, tower: str) -> int:
    places = {"first": 0, "middle": (count - 1) // 2, "last": count - 1}
    number = int(layer) if layer.isdecimal() else places.get(layer, count)
    if number >= count:
        raise ConfigError(
            f"layer {layer!r}: {tower} has {count} blocks; "
            f"give {', '.join(WORDS)} or 0 to {count - 1}"
        )
    return number


def _open(source: str, cache: Cache) -> Teacher:
    try:
        teacher = open_model(source, "encoder")
    except ModelError as error:
        raise ModelError(f"teacher = {source}: {error}") from None
    if _image_tower(teacher) is None:
        raise ConfigError(f"teacher = {source}: no image tower to look into; give a dual encoder")
    if teacher.identity() not in [one["identity"] for one in _teachers(cache)]:
        raise MismatchError(
            f"teacher = {source} is not what filled {cache.folder}; give {_sources(cache)}"
        )
    return teacher


def _teachers(cache: Cache) -> list[dict[str, Any]]:
    """List the teachers of a cache; a joined one has several."""
    return list(cache.teacher.get("parts") or [cache.teacher])


def _sources(cache: Cache) -> str:
    return " or ".join(str(one["source"]) for one in _teachers(cache))


def _image_tower(teacher: Any) -> Any:
    """Return the image tower of a student or a Hugging Face dual encoder; None without one."""
    inner = getattr(teacher, "model", None)
    return getattr(teacher, "image_tower", None) or getattr(inner, "vision_model", None)
