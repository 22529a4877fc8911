"""WebDataset shards: plain tar files in which an image and its captions share a key.

A sample is KEY.jpg (or .png, .webp, ...) with its captions beside it: KEY.txt or KEY.caption, a
caption a line, or KEY.json with `caption` or `captions` and, if you like, `split`. The members of a
sample stand next to each other, as the webdataset library writes and reads them. Its keys end at
the first dot; here photo.v2.jpg and photo.v3.jpg are two samples, each with the texts of its own
name up to the last dot. A text without such a dot (photo.txt) goes to the only image of its key.
Nothing is ever unpacked: opening is one pass over the shards, and after it every image is one
read at its offset.

`stream` is that pass. Every sample says where it begins and where the next one does, so another
process goes on from there at exactly the next sample.
"""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from crosstill import formats
from crosstill.data.collection import Entry, Listing, Packed, slice_path
from crosstill.data.fileset import FileSet, locate
from crosstill.data.listings import CAPTION, captions_of, first, split_of
from crosstill.data.pairs import regular, unreadable
from crosstill.errors import DataError, ImageError

TEXTS = (".txt", ".caption", ".json")
_INSIDE = 1  # headers lie at multiples of 512 bytes, so that this much more is a mark
_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


class Position(NamedTuple):
    """A place between two samples; as JSON it is a list of the two."""

    shard: str  # as the pattern names it, relative to the folder of all
    offset: int  # bytes from the start of the shard, + _INSIDE behind an image of the same key


class Sample(NamedTuple):
    """One image of a shard with its captions."""

    path: str  # as `Pairs.read` finds it again
    image: bytes
    captions: list[str]
    split: str | None
    start: Position
    next: Position


@dataclass
class Faults:
    """Collects what is no sample: damage and bad members one by one, the rest counted."""

    strict: bool = False  # raise the first bad one
    bad: list[ImageError] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, path: str, reason: str, size: int = 0) -> None:
        self.bad.append(ImageError(path, reason, size))
        if self.strict:
            raise self.bad[-1]


class _Member(NamedTuple):
    name: str
    start: int  # of its header
    offset: int  # of its bytes
    size: int
    problem: str  # why its bytes are not there, or ""
    next: int  # start of what follows

    @property
    def suffix(self) -> str:
        return formats.ending(self.name)

    @property
    def key(self) -> str:
        """Its name up to the first dot: members of one key stand next to each other."""
        folder, slash, name = formats.name_key(self.name).rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def stem(self) -> str:
        """Its name up to the last dot: an image and its texts share it."""
        return os.path.splitext(formats.name_key(self.name))[0]


def read(fileset: FileSet, images: Path | None) -> Listing:
    """List the samples of shards, in one pass over their bytes.

    Raises:
        DataError: a compressed shard, or a wrong split in a sample's JSON.
    """
    source, faults, entries = Packed(fileset.base), Faults(), []
    for sample in _stream(fileset, None, faults):
        source.note(sample.path, sample.image)
        where = fileset.where(sample.start.shard, f"sample at byte {sample.start.offset}")
        split = sample.split or fileset.split(sample.start.shard)
        entries.append(Entry(where, sample.path, sample.captions, split))
    notes = tuple(f"{text}: {count}" for text, count in faults.notes.items())
    return Listing(fileset.name, fileset.origin, source, entries, notes, tuple(faults.bad))


def stream(
    source: str | Path, start: Position | None = None, faults: Faults | None = None
) -> Iterator[Sample]:
    """Yield the samples of shards in order, one in memory at a time.

    Args:
        source: a shard, a folder of shards, or a pattern such as "shards/{000000..000009}.tar".
        start: where to go on: the `next` of the last sample that was used.
        faults: collects what is no sample; without it the first such thing raises.

    Raises:
        DataError: no such shards, a compressed one, or `start` is in none of them.
        ImageError: without `faults`, a damaged shard, or a member that cannot be used.
    """
    faults = Faults(strict=True) if faults is None else faults
    yield from _stream(locate(str(source)), start, faults)


def _stream(fileset: FileSet, start: Position | None, faults: Faults) -> Iterator[Sample]:
    names, offset = fileset.names, 0
    if start is not None:
        if start.shard not in names:
            raise DataError(f"{fileset.origin}: no shard {start.shard!r} to go on from; check it")
        names, offset = names[names.index(start.shard) :], start.offset
    inside = offset % 512 == _INSIDE
    offset -= _INSIDE if inside else 0
    for name in names:
        path = fileset.base / name
        try:
            with regular(path).open("rb") as file:
                for group in _groups(_members(file, path, name, offset, faults)):
                    yield from _samples(file, name, group, faults, inside)
                    inside = False
        except OSError as error:
            faults.add(name, unreadable(error))
        offset, inside = 0, False


def _members(
    file: IO[bytes], path: Path, shard: str, offset: int, faults: Faults
) -> Iterator[_Member]:
    """Yield the members of a shard that may be part of a sample, from an offset on."""
    size = path.stat().st_size
    if file.read(6).startswith(_PACKED):
        raise DataError(
            f"{path}: compressed; unpack it to a plain .tar first (gunzip, zstd -d): its images "
            "are read at their offsets"
        )
    file.seek(offset)
    at = offset
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (info := archive.next()) is not None:
                if not at < archive.offset <= size:
                    raise tarfile.ReadError("cut short")
                member = _member(info, at, archive.offset)
                at = archive.offset
                if _is_part(member, info, shard, faults):
                    yield member
                file.seek(at)
        file.seek(at)
        damage = _after(file)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        damage = " ".join(str(error).split()) or type(error).__name__
    if damage:
        text = f"corrupt at byte {at} of {size} ({damage}); what follows is lost"
        faults.add(shard, text)


def _member(info: tarfile.TarInfo, start: int, following: int) -> _Member:
    problem = ""
    if info.issparse():
        problem = "a sparse member of the archive"
    elif not info.isreg():
        problem = "a link in the archive" if info.issym() or info.islnk() else "no regular file"
    return _Member(info.name, start, info.offset_data, info.size, problem, following)


def _is_part(member: _Member, info: tarfile.TarInfo, shard: str, faults: Faults) -> bool:
    known = formats.PHOTOS | formats.UNSUPPORTED.keys() | {*TEXTS}
    if info.isdir():
        return False
    if formats.hidden(member.name) or member.suffix not in known:
        faults.notes["members that are neither images nor captions, not read"] += 1
        return False
    if member.problem:
        faults.add(f"{shard}/{member.name}", member.problem)
    return not member.problem


def _after(file: IO[bytes]) -> str:
    """Describe damage behind the last member; tarfile takes a bad header for the end."""
    end = file.read(1024)
    if end != bytes(1024):
        return "no end mark" if len(end) < 1024 else "a bad header"
    while rest := file.read(2**20):
        if any(rest):
            return "another archive behind the first"
    return ""


def _groups(members: Iterator[_Member]) -> Iterator[list[_Member]]:
    """Yield neighbours of one key; a name that comes again begins the next sample."""
    group: list[_Member] = []
    for member in members:
        if group and (member.key != group[0].key or member.name in (known.name for known in group)):
            yield group
            group = []
        group.append(member)
    if group:
        yield group


def _samples(
    file: IO[bytes], shard: str, group: list[_Member], faults: Faults, inside: bool
) -> Iterator[Sample]:
    """Yield the samples among the members of one key, in the order of their images.

    Args:
        file: the shard.
        shard: its name.
        group: neighbours of one key.
        faults: collects what is no sample.
        inside: whether other images of the key stand before the group.
    """
    samples = []
    for members in _by_image(group, faults, inside):
        images = [member for member in members if member.suffix not in TEXTS]
        readable = [image for image in images if not formats.unsupported(image.name)]
        for image in images:
            reason = formats.unsupported(image.name)
            if image in readable[1:]:
                reason = f"a second image of the sample {image.stem}"
            if reason:
                faults.add(f"{shard}/{image.name}", reason, image.size)
        if readable:
            samples.append((readable[0], [m for m in members if m.suffix in TEXTS], members[0]))
    starts = [first.start + _INSIDE for _, _, first in samples]
    starts[:1] = [group[0].start + (_INSIDE if inside else 0)] if samples else []
    ends = [*starts[1:], group[-1].next]
    for (image, texts, _), start, end in zip(samples, starts, ends, strict=False):
        captions: list[str] = []
        split = None
        for member in sorted(texts, key=lambda member: TEXTS.index(member.suffix)):
            new, own_split = _texts(_bytes(file, member), member, shard, faults)
            is_json = member.suffix == ".json"
            captions += [text for text in new if text not in captions or not is_json]
            split = split or own_split
        yield Sample(
            slice_path(shard, image.offset, image.size, image.name),
            _bytes(file, image),
            captions,
            split,
            Position(shard, start),
            Position(shard, end),
        )


def _by_image(group: list[_Member], faults: Faults, inside: bool) -> list[list[_Member]]:
    """Group the members of a key by their image (name), each group in the order of the shard.

    A text waits for its image only until the next image: so every sample but the first lies
    wholly behind the images before it, and a stream can go on at its first member. For the same
    reason an image whose stem was met before another one's begins a sample of its own.
    """
    stems = {member.stem for member in group if member.suffix not in TEXTS}
    # the only image gets texts named by the key
    alone = stems.pop() if len(stems) == 1 and not inside else ""
    samples: dict[str, list[_Member]] = {}  # the latest of each stem
    groups: list[list[_Member]] = []
    waiting: list[_Member] = []
    lost = 0
    for member in group:
        stem = alone if alone and member.stem in (alone, member.key) else member.stem
        if member.suffix in TEXTS:
            samples.get(stem, waiting).append(member)
            continue
        own = [t for t in waiting if t.stem == stem or (alone and t.stem == t.key)]
        lost += len(waiting) - len(own)
        waiting = []
        if stem not in samples or samples[stem] is not groups[-1]:
            samples[stem] = own
            groups.append(own)
        samples[stem].append(member)
    if lost + len(waiting):
        faults.notes["captions without an image beside them in the shard"] += lost + len(waiting)
    return groups


def _bytes(file: IO[bytes], member: _Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _texts(
    data: bytes, member: _Member, shard: str, faults: Faults
) -> tuple[list[str], str | None]:
    """Read captions and split from a member; one that cannot be read is a fault."""
    where = f"{shard}/{member.name}"
    try:
        text = formats.decode(data, where)
        if member.suffix != ".json":
            return formats.captions(text), None
        row: Any = json.loads(text)
    except DataError:
        faults.add(where, formats.BAD_TEXT, len(data))
    except (ValueError, RecursionError):
        faults.add(where, "corrupt JSON", len(data))
    else:
        row = row if isinstance(row, dict) else {}
        return captions_of(first(row, CAPTION), where, faults.notes), split_of(row, where)
    return [], None
