"""The index folder: its files, the pointer to the generation that counts, and verification.

index.json      seals itself; names the generation that counts and the SHA-256 of its files
bundle-1234…/   the bundle, so that the folder is enough to search
g-000003/       photos.sqlite and, where they are not in Milvus, the vectors; never changed
work.sqlite     what the builder remembers: see `builder_memory`
quarantine.jsonl  files that were left out, and why

A generation is written aside, flushed, renamed, and counts when the pointer names it. The one
before is kept until the next switch, for those who are just opening it.
"""

import hashlib
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field

from crosstill import artefacts, errors, files
from crosstill.bundle import Bundle, check_same
from crosstill.search import builder_memory, catalogue, memory_vectors, scan, vector_index

POINTER = "index.json"
MEMORY = "work.sqlite"
FORMAT = 1
CHUNK = 10_000  # vectors that are verified at a time
LONGER = 0.02  # by which a vector of 8-bit codes may miss unit length
Kind = Literal["flat", "codes", "hnsw", "milvus"]
Opened = TypeVar("Opened")
_FILES = (catalogue.NAME, *memory_vectors.NAMES)  # and no others


def _check_place(place: dict[str, str]) -> dict[str, str]:
    """Check where in Milvus the vectors are: a collection that `IndexWriter.move_to` has named."""
    if set(place) != {"uri", "collection"} or not vector_index.is_server(place["uri"]):
        raise ValueError("no Milvus")
    if not re.fullmatch("crosstill_[0-9a-f]{16}", place["collection"]):
        raise ValueError("a collection that crosstill has not named")
    return place


class Pointer(artefacts.Record):
    """The content of `index.json`.

    Attributes:
        generation: the number that counts.
        previous: the one before, still on disk; None after the first.
        identity: of the bundle that made the vectors.
        bundle: name of the folder of its copy.
        dim: D, the width of a vector.
        kind: "flat", "codes", "hnsw" or "milvus".
        folder: where the photos are, absolute.
        photos: how many.
        files: SHA-256 of the generation's files by name.
        quantiles: see `searcher.calibrate`; None without captions to calibrate on.
        milvus: uri and collection, where the vectors live there; the path of a Milvus Lite file
            that lies beside the index is relative to the index: see `milvus_place`.
    """

    model_config = ConfigDict(extra="ignore")

    generation: int = Field(ge=1, lt=10**9)
    previous: int | None = Field(ge=1, lt=10**9)
    identity: artefacts.Identity
    bundle: str = Field(pattern="^bundle-[0-9a-f]{12}$")
    dim: int = Field(ge=1, le=65_536)
    kind: Kind
    folder: str = Field(pattern="^/[^\0]*$")
    photos: int = Field(ge=0)
    files: dict[Literal[_FILES], artefacts.Sha256]  # type: ignore[valid-type]
    quantiles: list[float] | None = None
    milvus: (
        Annotated[dict[Literal["uri", "collection"], str], AfterValidator(_check_place)] | None
    ) = None


def read_pointer(index: Path) -> Pointer:
    """Read which generation of an index counts now.

    Raises:
        DataError: there is no index, or none of its photos has been published yet.
        CorruptError: the pointer is damaged.
    """
    path = index / POINTER
    if not path.is_file():
        raise errors.DataError(_absent(index))
    try:
        return artefacts.read(path, Pointer, {FORMAT})
    except errors.CrosstillError as error:
        raise catalogue.damaged(path, str(error).partition(": ")[2].partition(";")[0]) from None


def open_settled(index: Path, action: Callable[[Pointer], Opened]) -> Opened:
    """Open the generation that counts, again from the start where a build switched meanwhile."""
    while True:
        pointer = read_pointer(index)
        try:
            return action(pointer)
        except (errors.CrosstillError, OSError):
            if read_pointer(index) == pointer:
                raise


def generation_folder(index: Path, generation: int) -> Path:
    """Return the folder of a generation's files."""
    return index / f"g-{generation:06d}"


def next_number(index: Path) -> int:
    """Return a number that no generation on disk has."""
    return max((number for number, _ in _all(index)), default=0) + 1


def check_generation(index: Path, pointer: Pointer) -> None:
    """Compare every file of the generation with its SHA-256.

    Raises:
        CorruptError: one differs or is missing; it is named.
    """
    for problem in find_damage(index, pointer):
        raise problem


def find_damage(index: Path, pointer: Pointer) -> Iterator[errors.CorruptError]:
    """Yield an error for each file of the generation that differs, is missing or is a link."""
    artefacts.member(index, generation_folder(index, pointer.generation).name)
    if pointer.milvus:
        place = milvus_place(index, pointer.milvus["uri"])
        if place.endswith(vector_index.LITE) and not Path(place).exists():
            yield errors.CorruptError(
                f"{place}: the vectors of this index were there and are gone; put them back, or "
                "run `crosstill index` with --milvus NEW.db, which encodes nothing again"
            )
    folder = generation_folder(index, pointer.generation)
    yield from artefacts.problems(folder, pointer.files, catalogue.REMEDY)


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Give a folder to write into, which is flushed and moved to its place when the block ends."""
    new, old = (target.with_name(f"{files.TEMPORARY}{n}{target.name}") for n in ("", "old-"))
    with files.filled_aside(target, new, old):
        yield new


def switch(index: Path, pointer: Pointer) -> None:
    """Point the index to a generation, and remove those before the last one."""
    files.write_json(index / POINTER, files.sealed({"format": FORMAT, **pointer.model_dump()}))
    clean(index, pointer)


def clean(index: Path, pointer: Pointer | None) -> None:
    """Remove leftovers of killed builds, and generations and bundles that are no longer needed."""
    files.sweep(index)
    if pointer is None:
        return
    for number, path in _all(index):
        if number not in (pointer.generation, pointer.previous):
            shutil.rmtree(path, ignore_errors=True)
    for path in index.glob("bundle-*"):
        if path.name != pointer.bundle:
            shutil.rmtree(path, ignore_errors=True)


def copy_bundle(index: Path, bundle: Bundle) -> str:
    """Copy the bundle into the index, unless a sound copy is there; return the copy's name."""
    target = index / f"bundle-{bundle.fingerprint[:12]}"
    with suppress(errors.CrosstillError):
        if Bundle.open(artefacts.member(index, target.name)).identity == bundle.identity:
            return target.name
    with written_aside(target) as aside:
        for name in bundle.files:
            shutil.copyfile(artefacts.member(bundle.folder, name), aside / name)
    return target.name


def open_vectors(
    index: Path, pointer: Pointer, threads: int = 1, named: str | None = None
) -> vector_index.VectorIndex:
    """Open the vectors of a generation, wherever they live.

    Args:
        index: the folder.
        pointer: of the generation.
        threads: of one call, at most.
        named: the Milvus that the user has named in this call; see `milvus_token`.

    Raises:
        ConfigError: the secret of Milvus would go to a server that the user has not named.
    """
    if pointer.milvus is None:
        folder = generation_folder(index, pointer.generation)
        return vector_index.open_vectors(folder, pointer.dim, threads)
    uri, collection = milvus_place(index, pointer.milvus["uri"]), pointer.milvus["collection"]
    token = milvus_token(uri, named)
    return vector_index.open_vectors(uri, pointer.dim, threads, collection, token)


def milvus_place(index: Path, uri: str) -> str:
    """Resolve a place in Milvus: a URI as it is, a Milvus Lite file as an absolute path."""
    return str((index / uri).resolve()) if uri.endswith(vector_index.LITE) else uri


def milvus_token(uri: str, named: str | None = None) -> str | None:
    """Return the secret in `MILVUS_TOKEN`, which only a server that the user has named may see.

    Args:
        uri: of the server, as an index says, which may be a stranger's.
        named: the one that the user named in this call; that in `MILVUS_URI` counts too.

    Raises:
        ConfigError: there is a secret, and it is another server.
    """
    token = os.environ.get("MILVUS_TOKEN")
    if not token or uri.endswith(vector_index.LITE):
        return None
    trusted = {place.rstrip("/") for place in (named, os.environ.get("MILVUS_URI")) if place}
    if uri.rstrip("/") not in trusted:
        raise errors.ConfigError(
            f"the index keeps its vectors at {uri}, which you have not named, and MILVUS_TOKEN "
            f"would go there; if you trust it, set MILVUS_URI={uri}, if not, unset MILVUS_TOKEN"
        )
    return token


def digest_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder."""
    return artefacts.digests(folder, sorted(path.name for path in folder.iterdir()))


@dataclass(frozen=True)
class Verdict:
    """The result of a verification.

    Attributes:
        photos: in the index; 0 where its pointer is damaged.
        problems: one line each: what is damaged.
        mend: the command that mends and updates the index.
        gone, changed: how many files are no longer there, or are not what was indexed.
        outdated: a line for each of those files, or for a whole folder of files that are gone.
    """

    photos: int
    problems: list[str]
    mend: str
    gone: int = 0
    changed: int = 0
    outdated: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(index: Path) -> Verdict:
    """Check all of an index; nothing is changed.

    Raises:
        DataError: there is no index.
        LockedError: it is being built.
    """
    try:
        pointer = read_pointer(index)
    except errors.CorruptError as error:
        return Verdict(0, [str(error)], _repair_command(index, None))
    with files.locked(index):
        damaged_files = [str(error) for error in find_damage(index, pointer)]
        checks = (_check_bundle,) if damaged_files else (_check_bundle, _check_contents)
        memory = _problem(_check_memory, index, pointer)
        lines = [*damaged_files, *(_problem(check, index, pointer) for check in checks), memory]
        problems = [line for line in lines if line]
        verdict = Verdict(pointer.photos, problems, _repair_command(index, pointer))
        path = index / MEMORY
        known = {} if memory or not path.is_file() else builder_memory.read_files(path)
        return _with_outdated(verdict, index, pointer, known)


def _all(index: Path) -> list[tuple[int, Path]]:
    matches = ((re.fullmatch(r"g-(\d+)", path.name), path) for path in index.glob("g-*"))
    return [(int(match[1]), path) for match, path in matches if match]


def _absent(index: Path) -> str:
    if not index.is_dir():
        return f"{index}: no such index; make one with `crosstill index BUNDLE FOLDER --out INDEX`"
    if (index / MEMORY).is_file():
        return (
            f"{index}: the index was begun, but none of its photos is published yet; "
            "run `crosstill index` again, it goes on where it was"
        )
    return f"{index}: no index; make one with `crosstill index BUNDLE FOLDER --out INDEX`"


def _problem(check: Callable[[Path, Pointer], None], index: Path, pointer: Pointer) -> str | None:
    try:
        check(index, pointer)
    except errors.CrosstillError as error:
        return str(error)
    return None


def _check_bundle(index: Path, pointer: Pointer) -> None:
    bundle = Bundle.open(artefacts.member(index, pointer.bundle))
    check_same(pointer.identity, bundle.identity, f"{bundle.folder} is not the index's bundle")


def _check_contents(index: Path, pointer: Pointer) -> None:
    """Check catalogue and vectors, each by itself and against the other."""
    folder = generation_folder(index, pointer.generation)
    with (
        closing(catalogue.Catalogue(folder / catalogue.NAME)) as photos,
        closing(open_vectors(index, pointer)) as vectors,
    ):
        photos.check()
        numbers = np.array(sorted(photos.numbers().values()), np.int64)
        there = vectors.ids()
        lost, more = np.setdiff1d(numbers, there), np.setdiff1d(there, numbers)
        if len(numbers) != pointer.photos or len(lost) or (len(more) and not pointer.milvus):
            raise catalogue.damaged(
                folder,
                f"{pointer.photos} photos were published, the catalogue holds {len(numbers)}, of "
                f"which {len(lost)} have no vector, and {len(more)} vectors have no photo",
            )
        for start in range(0, len(numbers), CHUNK):
            lengths = np.linalg.norm(vectors.vectors(numbers[start : start + CHUNK]), axis=1)
            bad = int((np.abs(lengths - 1) > LONGER).sum())
            if bad:
                raise catalogue.damaged(folder, f"{bad} vectors are not of unit length")


def _check_memory(index: Path, pointer: Pointer) -> None:
    path = index / MEMORY
    if path.is_file():
        builder_memory.check(path)


def _with_outdated(
    verdict: Verdict, index: Path, pointer: Pointer, known: Mapping[str, scan.KnownFile]
) -> Verdict:
    """Add to a verdict the files that are gone or have changed."""
    root = Path(pointer.folder)
    folder = generation_folder(index, pointer.generation)
    try:
        with closing(catalogue.Catalogue(folder / catalogue.NAME)) as photos:
            rows = photos.rows()
    except errors.CrosstillError:  # it is among the problems already
        return verdict
    gone, changed = {}, []
    for path, row in sorted(rows.items()):
        try:
            status = os.stat(root / path)
        except OSError as error:
            gone[path] = f"{errors.printable(path)}: {error.strerror}"
            continue
        if why := _change(root, path, row, status, known.get(path)):
            changed.append(f"{errors.printable(path)}: {why}")
    folders = {f: n for f, n in scan.count_emptied(gone, rows.keys() - gone).items() if n > 1}
    lines = [
        f"{errors.printable(str(root / f))}: all {n:,} photos in it are gone"
        for f, n in folders.items()
    ]
    emptied = tuple("" if f == "." else f"{f}/" for f in folders)
    lines += [line for path, line in gone.items() if not path.startswith(emptied)]
    return replace(verdict, gone=len(gone), changed=len(changed), outdated=sorted(lines + changed))


def _change(
    root: Path,
    path: str,
    row: catalogue.Row,
    status: os.stat_result,
    known: scan.KnownFile | None,
) -> str:
    """Return how a photo differs from what was indexed; "" where it does not."""
    if (status.st_size, status.st_mtime_ns) != (row.size, row.mtime_ns):
        return "changed since it was indexed"
    if known and (known.stamp.ctime_ns, known.sha) == (status.st_ctime_ns, row.sha):
        return ""
    try:
        if hashlib.sha256(scan.read_photo(root, path)).digest() == row.sha:
            return ""
    except errors.ImageError as error:
        return error.reason
    return "changed since it was indexed, and yet of the same size and time"


def _repair_command(index: Path, pointer: Pointer | None) -> str:
    """Return the command that mends the index, with its own bundle where that is whole."""
    if pointer is None:
        return f"crosstill index BUNDLE FOLDER --out {shlex.quote(str(index))}"
    own = str(index / pointer.bundle)
    bundle = "BUNDLE" if _problem(_check_bundle, index, pointer) else shlex.quote(own)
    where = [shlex.quote(errors.printable(name)) for name in (pointer.folder, str(index))]
    command = f"crosstill index {bundle} {where[0]} --out {where[1]}"
    place = Path(milvus_place(index, pointer.milvus["uri"]) if pointer.milvus else "")
    return (
        command
        if place.suffix != vector_index.LITE or place.exists()
        else f"{command} --milvus NEW.db"
    )
