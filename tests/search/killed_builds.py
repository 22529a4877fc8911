"""An index whose builds are killed at random moments, looked at after every kill.

    python killed_builds.py FOLDER SEED KILLS

A trial changes the photos (add, delete, move, edit), starts a build, kills it at a moment that the
trial's seed decides, and checks what readers find. Trials go on until so many kills have struck
before the end of their build. Prints how many of those left other photos published than before.
Every build is a process of its own, forked from this one so that only this one pays for the
imports.

A moment is drawn over the files that a build opens, renames and flushes as well as over time, so
that kills fall inside writes and not only between them.
"""

import hashlib
import itertools
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import fakes
import numpy as np

from crosstill.errors import DataError
from crosstill.search import index_builder, index_folder, searcher
from crosstill.search.index_folder import verify
from crosstill.search.searcher import Searcher

WATCHED = (
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.scandir",
    "sqlite3.connect",
    "shutil.rmtree",
)
SEEDS = 400  # of different photos

index_builder.Encoder = searcher.Encoder = fakes.FakeEncoder
index_builder.BATCH, index_builder.QUEUE, index_builder.FIRST = 8, 2, 20


def on_file_event(act: Callable[[str], object]) -> None:
    sys.addaudithook(lambda event, args: act(str(args)) if event in WATCHED else None)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(draw: random.Random, events: int, seconds: float) -> None:
    """Die at a moment that the draw decides, within the events and seconds of a whole build.

    A third of the moments count from where a generation begins to be written.
    """
    kind, moment = draw.choice(("time", "event", "late")), draw.uniform(0, seconds)
    left = iter(range(draw.randrange(events)))
    timer = threading.Timer(moment if kind == "time" else moment / 4, die)

    def begin(what: str) -> None:
        if ".writing-g-" in what and not timer.ident:
            timer.start()

    if kind == "time":
        timer.start()
    elif kind == "event":
        on_file_event(lambda what: die() if next(left, None) is None else None)
    else:
        on_file_event(begin)


def in_child(step: Callable[[], object]) -> int:
    """Take a step in a process of its own; its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        step()
        os._exit(0)
    finally:
        os._exit(1)


class Trials:
    """Photos, their index, and what must be true of it."""

    def __init__(self, place: Path) -> None:
        self.root, self.index, self.note = place / "photos", place / "index", place / "whole.txt"
        self.bundles = [fakes.bundle(place / name, name, range(30)) for name in ("one", "two")]
        self.bundle = self.bundles[0]
        self.events, self.seconds = 0, 0.0

    def measure(self) -> None:
        """How many file events and seconds a first build takes."""
        self.change(random.Random(0), 60)

        def whole() -> None:
            events = itertools.count()
            on_file_event(lambda what: next(events))
            began = time.monotonic()
            self.build(rebuild=False)
            self.note.write_text(f"{next(events)} {time.monotonic() - began}")

        assert in_child(whole) == 0
        events, seconds = self.note.read_text().split()
        self.events, self.seconds = int(events), float(seconds)

    def build(self, rebuild: bool) -> None:
        index_builder.build(self.bundle, self.root, self.index, rebuild=rebuild)

    def change(self, draw: random.Random, count: int) -> None:
        """Add, overwrite, move and delete photos."""
        for _ in range(count):
            path = self.root / f"{draw.randrange(4)}/{draw.randrange(60)}.ppm"
            path.parent.mkdir(parents=True, exist_ok=True)
            there = sorted(self.root.rglob("*.ppm"))
            if there and draw.random() < 0.3:
                draw.choice(there).rename(path)
            elif len(there) > 1 and draw.random() < 0.25:
                draw.choice(there).unlink()
            else:
                path.write_bytes(fakes.photo(draw.randrange(SEEDS)))
        (self.root / "bad.jpg").write_bytes(draw.randbytes(9))

    def trial(self, seed: int) -> tuple[bool, bool]:
        """Change, build, kill, check: whether the kill struck, and left a newer generation."""
        draw = random.Random(seed)
        if draw.random() < 0.15:
            shutil.rmtree(self.index, ignore_errors=True)
        self.change(draw, draw.choice((3, 10, 60)))
        before, reader = self.state(), self.open()
        rebuild = draw.random() < 0.2
        if rebuild:
            self.bundle = draw.choice(self.bundles)

        def build() -> None:
            arm(draw, self.events, self.seconds)
            self.build(rebuild)

        status = in_child(build)
        struck = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert struck or status == 0, f"trial {seed} failed by itself"
        after = self.check(before, seed)
        if reader:
            self.serves(reader, before)
        if draw.random() < 0.5:
            assert in_child(lambda: self.build(False)) == 0, f"trial {seed} does not go on"
            self.finished(seed)
        return struck, struck and before != after

    def open(self) -> Searcher | None:
        return Searcher.open(self.index) if (self.index / index_folder.POINTER).exists() else None

    def state(self) -> dict[str, bytes]:
        """SHA-256 by path of what is acknowledged; nothing where an index has not begun."""
        try:
            opened = Searcher.open(self.index)
        except DataError as error:
            assert "none of its photos is published yet" in str(error) or "no " in str(error)
            assert not list(self.index.glob(index_folder.POINTER))
            return {}
        found = {path: row.sha for path, row in opened._opened.photos.rows().items()}
        opened.close()
        return found

    def on_disk(self) -> dict[str, bytes]:
        found = (path for path in self.root.rglob("*.ppm"))
        return {
            str(p.relative_to(self.root)): hashlib.sha256(p.read_bytes()).digest() for p in found
        }

    def check(self, before: dict[str, bytes], seed: int) -> dict[str, bytes]:
        """All that was acknowledged and still exists is there, whole, and can be found."""
        after, disk = self.state(), self.on_disk()
        lost = set(before.values()) & set(disk.values()) - set(after.values())
        assert not lost, f"trial {seed}: {len(lost)} acknowledged photos are gone"
        if not after:
            return after
        problems = verify(self.index).problems
        assert not problems, f"trial {seed}: {problems}"
        pointer = index_folder.read_pointer(self.index)
        self.bundle = next(b for b in self.bundles if b.name == pointer.identity["weights"])
        opened = Searcher.open(self.index)
        vectors = {fakes.sha(n): fakes.row(n) for n in range(SEEDS)}
        for photo in {sha.hex() for sha in after.values()}:
            own = opened.vector(photo)
            assert own is not None and np.allclose(own, vectors[photo], atol=1e-6), f"trial {seed}"
            assert opened.find(own[None], 1)[0][0].id == photo, f"trial {seed}"
        opened.close()
        return after

    def serves(self, reader: Searcher, before: dict[str, bytes]) -> None:
        """Who opened the index before the build finds in it what was there, then what is new."""
        some = sorted(before.values())[0].hex()
        vector = reader.vector(some)
        assert reader.find(vector[None], 1)[0][0].id == some and len(reader) == len(
            {*before.values()}
        )
        other = reader.bundle.identity != index_folder.read_pointer(self.index).identity
        if reader.refresh() or not other:
            assert reader.generation == index_folder.read_pointer(self.index).generation

    def finished(self, seed: int) -> None:
        """A build that was let through leaves exactly what is on the disk, and no litter."""
        assert self.state() == self.on_disk(), f"trial {seed}"
        self.check(self.on_disk(), seed)
        names = {re.sub("-[0-9a-f]+$", "-", path.name) for path in self.index.iterdir()}
        ours = {"index.json", "work.sqlite", "quarantine.jsonl", ".lock", "bundle-", "g-"}
        assert names <= ours, f"trial {seed}: {names - ours}"
        assert len(list(self.index.glob("bundle-*"))) == 1
        assert len(list(self.index.glob("g-*"))) <= 2


def main() -> None:
    seed, kills = int(sys.argv[2]), int(sys.argv[3])
    trials, struck, published = Trials(Path(sys.argv[1])), 0, 0
    trials.measure()
    while struck < kills:
        died, new = trials.trial(seed)
        seed, struck, published = seed + 1, struck + died, published + new
        assert seed < int(sys.argv[2]) + 10 * kills + 10, f"only {struck} kills struck"
    assert in_child(lambda: trials.build(False)) == 0
    trials.finished(seed)
    sys.stdout.write(f"{published}\n")


if __name__ == "__main__":
    main()
