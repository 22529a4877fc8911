"""A teacher's outputs on disk: keyed by content, memory-mapped, checksummed, resumable.

A dual encoder leaves features of every row in a `Cache`; features of several dual encoders are
joined into one `Cache`. `crosstill.fusion` has the caches of a fusion model's scores.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from crosstill.artefacts import is_cache
from crosstill.cache import memo
from crosstill.cache.feature_build import build_features
from crosstill.cache.format import Cache, CacheBase, Split, open
from crosstill.cache.joined import join
from crosstill.cache.memo import PixelStore, pixels
from crosstill.data import Pairs
from crosstill.errors import ConfigError
from crosstill.models import open as open_model
from crosstill.teachers.base import PairModel, Teacher, kind_of
from crosstill.teachers.features import FeaturesTeacher

__all__ = [
    "Cache",
    "CacheBase",
    "PixelStore",
    "Split",
    "build",
    "build_features",
    "is_cache",
    "join",
    "memo",
    "open",
    "pixels",
]

# kinds of models → what builds a cache of one's outputs; score caches are an annex, found by name
BUILDERS = {
    "encoder": "crosstill.cache.feature_build:build_features",
    "vectors": "crosstill.cache.feature_build:build_features",
    "matcher": "crosstill.fusion.scores:build_scores",
}


def build(  # noqa: PLR0913  (every option of a cache is an argument)
    teacher: str | Path | Teacher | FeaturesTeacher | PairModel | None,
    pairs: Pairs,
    folder: str | Path,
    *,
    views: int | None = None,
    augment: tuple[str, ...] | None = None,
    dtype: str | None = None,
    raw: bool | None = None,
    batch_size: int | None = None,
    false: int | None = None,
    false_images: int | None = None,
    find: str | Path | Cache | Teacher | None = None,
    seed: int = 0,
    strict: bool = False,
    teacher_licence: str | None = None,
    texts: Iterable[str | Path] | None = None,
) -> CacheBase:
    """Make the cache that suits a teacher, or finish it, or find it already there.

    Args:
        teacher: a model, or what `crosstill.open_model` opens; None keeps captions without a
            teacher, and the candidates of a score cache where an option of one is given.
        pairs: the dataset, all splits.
        folder: where the cache is, or is to be.
        views: of features: see `build_features`, for `augment`, `dtype`, `raw` and `batch_size`
            too; None takes its defaults.
        augment: what makes the views behind the first.
        dtype: how features are stored.
        raw: keep the length of each row before its L2 normalisation too.
        batch_size: images or captions in one pass.
        false: of scores: see `crosstill.fusion.build_scores`, for `false_images` and `find` too.
        false_images: false images of each caption.
        find: what finds the false ones.
        seed: of views, and of what is drawn at random.
        strict: stop at the first unreadable image.
        teacher_licence: where the teacher's card does not say.
        texts: of features: texts without photos; a `Path` is a UTF-8 file with one a line, a `str`
            is a text.

    Raises:
        ConfigError: an option that cannot be, or of the other kind of cache.
        InputError: see `build_features` and `crosstill.fusion.build_scores`.
    """
    features = _given(
        views=views, augment=augment, dtype=dtype, raw=raw, batch_size=batch_size, texts=texts
    )
    scores = _given(false=false, false_images=false_images, find=find)
    if augment is not None and views in (None, 1):
        raise ConfigError("--augment: makes the views behind the first; give --views 2 or more")
    model = open_model(teacher) if isinstance(teacher, str | Path) else teacher
    kind = ("matcher" if scores else "encoder") if model is None else kind_of(model)
    if kind == "matcher":
        own, others, outputs = scores, features, "keeps scores of pairs and no features"
    else:
        own, others, outputs = features, scores, "embeds images and captions and needs no pairs"
    if others:
        option = next(iter(others)).replace("_", "-")
        named = teacher is None or isinstance(teacher, str | Path)
        name = teacher or "none" if named else getattr(teacher, "name", type(teacher).__name__)
        raise ConfigError(f"--{option}: {name} {outputs}; leave it out")
    make: Callable[..., CacheBase] = resolve_name(BUILDERS[kind])
    common = {"seed": seed, "strict": strict, "teacher_licence": teacher_licence}
    return make(model, pairs, folder, **common, **own)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
