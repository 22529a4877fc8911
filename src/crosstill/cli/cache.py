"""`crosstill cache`: run a teacher once and keep what it said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crosstill.cli import common

if TYPE_CHECKING:
    from crosstill.cache import Cache


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
    out: Annotated[Path | None, typer.Option(help="Folder of the cache to make.")] = None,
    views: Annotated[int, typer.Option(help="Views of each image; the first is the photo.")] = 1,
    dtype: Annotated[str, typer.Option(help="How features are stored: fp16 or fp32.")] = "fp16",
    batch_size: Annotated[int, typer.Option(help="Images or captions in one pass.")] = 64,
    strict: common.Strict = False,
) -> None:
    """Run TEACHER over DATA once and keep its features in a cache.

    A cache that was interrupted goes on where it was; one that is finished is only checked.
    `crosstill cache verify CACHE` checks every byte of a finished cache.
    """
    if teacher == "verify":
        _verify(Path(data))
        return
    if out is None:
        raise typer.BadParameter("give the folder of the cache to make", param_hint="--out")
    common.hush()
    from crosstill import cache
    from crosstill import data as sources
    from crosstill.evaluate import open_model

    pairs = sources.open(data, images=images, strict=strict)
    for line in pairs.notes:
        common.note(line)
    model = None if teacher == "none" else open_model(teacher)
    options = {"views": views, "dtype": dtype, "batch_size": batch_size, "strict": strict}
    made = cache.build(model, pairs, out, **options)
    common.quarantine_note(made.header["quarantined"], str(out / "quarantine.jsonl"))
    _describe(made)


def _verify(folder: Path) -> None:
    from crosstill.cache import Cache as Opened

    _describe(Opened(folder))


def _describe(cache: Cache) -> None:
    width = f"{cache.dim} wide" if cache.dim else "no features"
    splits = ", ".join(
        f"{name} {len(cache.split(name).images):,}" for name in sorted(set(cache.splits))
    )
    common.say(
        f"{cache.folder}: whole; {len(cache.image_ids):,} images ({splits}), "
        f"{len(cache.texts):,} captions, {width}, teacher {cache.teacher['name'] or 'none'}"
    )
