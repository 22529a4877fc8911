"""`crosstill index`: photos into an index that can be searched."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crosstill import files
from crosstill.cli import common
from crosstill.errors import ConfigError, RunError

if TYPE_CHECKING:
    from crosstill.search import Verdict

Target = Annotated[
    Path | None, typer.Argument(help="The folder of photos. After `verify`: the index.")
]
Out = Annotated[Path | None, typer.Option(help="Folder of the index to make or bring up to date.")]
Workers = Annotated[
    int | None,
    typer.Option(help="Threads that read and decode photos.", show_default="one a core"),
]
Threads = Annotated[int, typer.Option(help="Threads of the encoder.")]
Milvus = Annotated[
    str | None,
    typer.Option(
        metavar="URI",
        help="Keep the vectors in Milvus: http://host:19530, or a path in *.db for Milvus Lite. "
        "Its token is read from MILVUS_TOKEN.",
    ),
]
Rebuild = Annotated[
    bool,
    typer.Option(
        "--rebuild", help="Start from nothing, also with another bundle; the old one serves on."
    ),
]


def command(
    bundle: Annotated[
        str, typer.Argument(help="An exported bundle, or `verify` to check the index named next.")
    ],
    folder: Target = None,
    out: Out = None,
    workers: Workers = None,
    threads: Threads = 1,
    milvus: Milvus = None,
    strict: common.Strict = False,
    rebuild: Rebuild = False,
    as_json: common.AsJson = False,
) -> None:
    """Index the photos of FOLDER with BUNDLE, or bring their index up to date.

    Only what is new or has changed is read. A build that was interrupted goes on where it was.
    `crosstill index verify INDEX` checks all of an index.
    """
    if folder is None:
        what = "the index to check" if bundle == "verify" else "the folder of photos"
        raise typer.BadParameter(f"give {what}", param_hint="FOLDER")
    if bundle == "verify":
        given = (out, workers, milvus, strict or None, rebuild or None)
        if any(value is not None for value in given) or threads != 1:
            raise ConfigError("index verify: takes no option but --json")
        _verify(folder, as_json)
        return
    if out is None:
        raise typer.BadParameter("give the folder of the index to make", param_hint="--out")
    files.check_writable(out)
    from crosstill.search import build
    from crosstill.search.index_builder import QUARANTINE

    built = build(
        bundle,
        folder,
        out,
        workers=workers,
        threads=threads,
        milvus=milvus,
        strict=strict,
        rebuild=rebuild,
    )
    common.quarantine_note(out / QUARANTINE)
    if as_json:
        common.dump(built.to_json())
        return
    common.say(
        f"{out}: {built.photos:,} photos; files: {built.new:,} new, {built.unchanged:,} unchanged, "
        f"{built.changed:,} changed, {built.moved:,} moved, {built.deleted:,} deleted, "
        f"{built.unreadable:,} left out; {built.encoded:,} encoded in {built.seconds:,.1f} s"
    )


def _verify(index: Path, as_json: bool) -> None:
    from crosstill.search import verify

    verdict = verify(index)
    if as_json:
        common.dump(verdict.to_json())
    for line in () if as_json else (*verdict.problems, *verdict.outdated):
        common.say(line)
    if verdict.problems:
        raise RunError(f"{index}: {len(verdict.problems)} damaged; mend it with: {verdict.mend}")
    if not as_json:
        common.say(f"{index}: whole; {verdict.photos:,} photos{_outdated(verdict)}")
    if verdict.outdated:
        common.note(f"bring it up to date with: {verdict.mend}")


def _outdated(verdict: Verdict) -> str:
    counts = {"gone": verdict.gone, "changed since": verdict.changed}
    return "".join(f", {count:,} {what}" for what, count in counts.items() if count)
