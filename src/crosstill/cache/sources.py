"""Where the image rows of a cache come from: a model's eyes, a file of vectors, or nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from crosstill import images, progress
from crosstill.errors import ImageError, ModelError
from crosstill.teachers.base import Teacher, embed_by_length
from crosstill.teachers.features import FeaturesTeacher
from crosstill.types import Example


class Pixels:
    """Image rows from a teacher that looks at photos."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def load(self, data: bytes, example: Example, view: images.View | None) -> Tensor | None:
        return images.load(data, example.path, self._teacher.preprocess, view)

    def embed(self, loaded: Tensor) -> Tensor:
        return self._teacher.embed_images(loaded)


class Vectors(Pixels):
    """Image rows from vectors made elsewhere, found by file name."""

    def __init__(self, teacher: FeaturesTeacher) -> None:
        self._vectors = teacher

    def load(self, data: bytes, example: Example, view: images.View | None) -> Tensor | None:
        images.decode(data, example.path)
        rows, missing = self._vectors.lookup_images([example.path])
        if missing:
            raise ImageError(example.path, f"no vector in {self._vectors.name}")
        return rows[0]

    def embed(self, loaded: Tensor) -> Tensor:
        return loaded


class Nothing(Pixels):
    """No rows at all, only the check that a photo can be read, and brought to a model's size."""

    def __init__(self, preprocess: images.Preprocess | None = None) -> None:
        self._preprocess = preprocess

    def load(self, data: bytes, example: Example, view: images.View | None) -> Tensor | None:
        if self._preprocess is None:
            images.decode(data, example.path)
        else:
            images.load(data, example.path, self._preprocess, view)
        return None


def source_for(teacher: Teacher | FeaturesTeacher | None) -> Pixels:
    """The source that suits a teacher.

    Raises:
        ModelError: the teacher has no image side.
    """
    if teacher is None:
        return Nothing()
    if "image" not in teacher.modalities:
        raise ModelError(f"{teacher.name}: a teacher needs image features")
    return Vectors(teacher) if isinstance(teacher, FeaturesTeacher) else Pixels(teacher)


def ahead(
    rows: Sequence[Any], size: int, pool: ThreadPoolExecutor, load: Callable[[Any], Any]
) -> Iterator[list[Any]]:
    """Loaded batches; the next one is being loaded while the caller works on this one."""
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    pending = [pool.submit(load, row) for batch in batches[:1] for row in batch]
    for following in [*batches[1:], []][: len(batches)]:
        ready, pending = pending, [pool.submit(load, row) for row in following]
        yield [future.result() for future in ready]


def embed_texts(
    teacher: Teacher | FeaturesTeacher, texts: Sequence[str], size: int, bar: progress.Bar
) -> Tensor:
    """Features (T, D), `size` texts in a pass; those of one length share it and its padding.

    Raises:
        ModelError: a folder of vectors lacks one of the texts.
    """
    if isinstance(teacher, FeaturesTeacher):
        return _looked_up(teacher, texts, bar)
    return embed_by_length(texts, lambda some: teacher.embed_texts(some).cpu(), size, bar)


def _looked_up(teacher: FeaturesTeacher, texts: Sequence[str], bar: progress.Bar) -> Tensor:
    rows, missing = teacher.lookup_texts(texts)
    if missing:
        raise ModelError(
            f"{teacher.folder}: no vector of {len(missing)} captions, {missing[0][:60]!r} among "
            "them; add them, or take the texts' vectors out to learn from images only"
        )
    bar.advance(len(texts))
    return rows
