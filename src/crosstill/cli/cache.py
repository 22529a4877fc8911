"""`crosstill cache`: run a teacher once and keep its outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crosstill import files
from crosstill.cli import common

if TYPE_CHECKING:
    from crosstill.cache import CacheBase

Views = Annotated[
    int | None, typer.Option(help="Views of each image; the first is the photo.", show_default="1")
]
Augment = Annotated[
    str | None,
    typer.Option(
        help="What makes the other views: random crops, mirroring, colours.",
        show_default="crop,flip,colour",
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="How features are stored: fp16 or fp32.", show_default="fp16")
]
Raw = Annotated[
    bool | None,
    typer.Option(
        "--raw",
        help="Also keep how long the teacher's rows are before their normalisation, for runs with "
        "normalise=false.",
        show_default=False,
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(help="Images or captions in one pass.", show_default="64")
]
False_ = Annotated[
    int | None,
    typer.Option(
        help="Fusion teacher: false captions of each image to score. With `none`: to keep without "
        "scores, for training a fusion teacher.",
        show_default="63",
    ),
]
FalseImages = Annotated[
    int | None, typer.Option(help="The same, false images of each caption.", show_default="7")
]
Find = Annotated[
    str | None,
    typer.Option(
        help="Who finds the false ones: random, batch, or a cache of features or a dual encoder, "
        "whose highest cosines they are.",
        show_default="random",
    ),
]
Texts = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="LINES",
        help="A file of sentences without photos, a line each, to learn from too; more files by "
        "repeating it.",
    ),
]
Licence = Annotated[
    str | None, typer.Option(help="Of photos and captions, where no README.md beside them says.")
]
TeacherLicence = Annotated[
    str | None, typer.Option(help="Of the teacher, where its own card does not say.")
]


def command(
    teacher: Annotated[
        str,
        typer.Argument(
            help="A teacher's folder or hub id, a folder of vectors, a run, `none` for captions "
            "without a teacher, or `verify` to check the cache named next."
        ),
    ],
    data: Annotated[str, typer.Argument(help=common.DATA + " After `verify`: the cache.")],
    images: common.Images = None,
    splits: common.Splits = None,
    texts: Texts = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the cache to make.")] = None,
    views: Views = None,
    augment: Augment = None,
    dtype: Dtype = None,
    raw: Raw = None,
    batch_size: BatchSize = None,
    false: False_ = None,
    false_images: FalseImages = None,
    find: Find = None,
    seed: Annotated[int, typer.Option(help="Of views, and of what is drawn at random.")] = 0,
    licence: Licence = None,
    teacher_licence: TeacherLicence = None,
    strict: common.Strict = False,
) -> None:
    """Run TEACHER over DATA once and keep its features, or a fusion teacher's scores, in a cache.

    DATA may hold photos without captions, and --texts adds sentences without photos.
    A cache that was interrupted goes on where it was; one that is finished is only checked.
    `crosstill cache verify CACHE` checks every byte of a finished cache.
    """
    if teacher == "verify":
        common.check_cache(Path(data))
        from crosstill import cache

        _describe(cache.open(data))
        return
    if out is None:
        raise typer.BadParameter("give the folder of the cache to make", param_hint="--out")
    common.check_data(data)
    files.check_writable(out)
    common.hush()
    from crosstill import cache
    from crosstill import data as sources

    pairs = sources.open(data, images=images, strict=strict, licence=licence, splits=splits)
    for line in pairs.notes:
        common.note(line)
    made = cache.build(
        None if teacher == "none" else teacher,
        pairs,
        out,
        views=views,
        augment=None if augment is None else tuple(kind.strip() for kind in augment.split(",")),
        dtype=dtype,
        raw=raw,
        batch_size=batch_size,
        false=false,
        false_images=false_images,
        find=find,
        seed=seed,
        strict=strict,
        teacher_licence=teacher_licence,
        texts=texts or None,
    )
    common.quarantine_note(out / "quarantine.jsonl")
    _describe(made)


def _describe(cache: CacheBase) -> None:
    splits = ", ".join(
        f"{name} {len(cache.split(name).images):,}" for name in sorted(set(cache.splits))
    )
    bare = len(cache.image_ids) - len(set(cache.owner[cache.owner >= 0].tolist()))
    photos = f", {bare:,} of them without captions" if bare else ""
    teacher = cache.teacher["name"] or "none"
    common.say(
        f"{cache.folder}: whole; {len(cache.image_ids):,} images ({splits}){photos}, "
        f"{common.texts(cache)}, {cache.summary()}, teacher {teacher}"
    )
