"""Changes artefacts at random and opens them; run as a script, which prints what went wrong.

    python mutated.py KIND ARTEFACT HOME SEED COUNT

KIND is "bundle", "index", "cache" or "run". A change is to one name, number, text or list of a
record, which is sealed again, or to the bytes of a file, whose checksums are then brought up to
date. HOME is a new folder; all that lies in it but outside of the changed copy must stay as it is.
"""

import json
import logging
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from resealed import reseal

from crosstill import files
from crosstill.errors import CrosstillError

LONGEST = 10  # CPU seconds of one artefact, which what else runs does not lengthen
VALUES: list[Any] = [
    *("../outside", "/etc/hostname", "a/b", "", ".", "..", "x\0y", "\ud800", "x" * 100_000, "fp32"),
    *(0, -1, 1, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf"), True, None),
    *([], {}, [[]], ["../outside"], {"../outside": "0" * 64}, [1] * 1000),
]


class Hang(BaseException):
    """No library's handler of exceptions may swallow it."""


def deep() -> Any:
    value: Any = 1
    for _ in range(900):
        value = [value]
    return value


def places(value: Any, way: tuple = ()) -> list[tuple]:
    """The way to every value of a record."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in items:
        found.append((*way, key))
        if isinstance(inner, dict | list):
            found += places(inner, (*way, key))
    return found


def change_record(path: Path, choose: np.random.Generator) -> str:
    record = json.loads(path.read_text())
    ways = [way for way in places(record) if way[0] != "sha256"]
    way = ways[choose.integers(len(ways))]
    held: Any = record
    for key in way[:-1]:
        held = held[key]
    value = [*VALUES, deep()][choose.integers(len(VALUES) + 1)]
    kind = choose.integers(4)
    if kind == 0 and isinstance(held, dict):  # its name
        name = value if isinstance(value, str) else "../outside"
        held[name] = held.pop(way[-1])
    elif kind == 1:
        held.pop(way[-1])
    else:
        held[way[-1]] = value
    files.write_json(path, files.sealed(record))
    return f"{path.name} {way} {str(value)[:40]}"


def change_bytes(path: Path, choose: np.random.Generator) -> str:
    data = bytearray(path.read_bytes())
    kind = choose.integers(6)
    head = min(len(data), 4096 if kind % 2 else len(data))
    at = int(choose.integers(max(1, head)))
    if kind < 3 and data:
        for place in choose.integers(head, size=choose.integers(1, 9)):
            data[place] = choose.integers(256)
    elif kind == 3:
        del data[at:]
    elif kind == 4:
        data[at : at + 8] = int(choose.integers(2**63)).to_bytes(8, "little")
    else:
        data[at:at] = data[: choose.integers(1, 4096)]
    path.write_bytes(data)
    return f"{path.name} bytes {kind} at {at}"


def change_file(path: Path, home: Path, choose: np.random.Generator) -> str:
    kind = choose.integers(3)
    path.unlink()
    if kind == 0:
        path.symlink_to(home / "outside/secret")
    elif kind == 1:
        path.mkdir()
    return f"{path.name} {('a link', 'a folder', 'gone')[kind]}"


def mutate(folder: Path, home: Path, choose: np.random.Generator) -> str:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    records = [path for path in paths if path.suffix == ".json" and path.name != "tokenizer.json"]
    kind = choose.integers(10)
    if kind < 5:
        return change_record(records[choose.integers(len(records))], choose)
    path = paths[choose.integers(len(paths))]
    if kind == 9:
        return change_file(path, home, choose)
    told = change_bytes(path, choose)
    if choose.integers(4):
        try:
            reseal(folder)
        except (ValueError, KeyError, TypeError, OSError):  # the record itself was changed
            return told
    return told


def open_bundle(folder: Path) -> None:
    from crosstill import bundle

    opened = bundle.Bundle.open(folder)
    bundle.calibration(opened)
    bundle.Encoder(opened).warm()
    bundle.Encoder(opened).count_truncated(["a red circle on a table"])


def open_index(folder: Path) -> None:
    from crosstill.search import index_folder, searcher

    index_folder.verify(folder)
    opened = searcher.Searcher.open(folder)
    try:
        found = opened.find(opened.encode_texts(["a red circle"]), 5)[0]
        for hit in found:
            opened.photo(hit.id)
            opened.vector(hit.id)
        opened.threshold()
    finally:
        opened.close()


def open_cache(folder: Path) -> None:
    from crosstill import cache

    opened = cache.open(folder)
    for name in sorted(set(opened.splits)):
        rows = opened.split(name)
        opened.pairs(name)
        if isinstance(opened, cache.Cache) and opened.modalities == {"image", "text"}:
            opened.features(rows.images, rows.captions[: len(rows.images)])
    if opened.views > 1:
        opened.view(0, 1)


def open_run(folder: Path) -> None:
    from crosstill import models, recipes
    from crosstill.report import curves
    from crosstill.train import Run, checkpoint

    run = Run(folder)
    recipes.resumed(folder)
    checkpoint.load_latest(folder / "checkpoints")
    curves.read(folder)
    models.open(folder, "live")
    _ = run.config, run.metrics, run.untrained


OPEN: dict[str, Callable[[Path], None]] = {
    "bundle": open_bundle,
    "index": open_index,
    "cache": open_cache,
    "run": open_run,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def peak() -> int:
    """Bytes of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def hang(signum: int, frame: Any) -> None:
    raise Hang


def attempt(kind: str, folder: Path) -> tuple[str, str]:
    """What became of an artefact: a word, and the traceback where there should be none."""
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        OPEN[kind](folder)
        return "opened", ""
    except CrosstillError as error:
        return ("refused", "") if "\n" not in str(error) else ("lines", str(error))
    except OSError as error:  # the verbs say it in one line
        return "refused", "" if error.filename else traceback.format_exc()
    except Hang:
        return "hang", traceback.format_exc()
    except BaseException:
        return "traceback", traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main(kind: str, artefact: Path, home: Path, seed: int, count: int) -> dict[str, Any]:
    (home / "outside").mkdir(parents=True)
    (home / "outside/secret").write_text("mine")
    signal.signal(signal.SIGPROF, hang)
    logging.disable(logging.CRITICAL)
    OPEN[kind](artefact)
    base, outcomes, longest, faults = peak(), Counter[str](), 0.0, []
    for number in range(count):
        choose = np.random.default_rng([seed, number])
        folder = home / "theirs/artefact"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(artefact, folder)
        told = mutate(folder, home, choose)
        before, began = peak(), time.process_time()
        word, text = attempt(kind, folder)
        longest = max(longest, time.process_time() - began)
        outcomes[word] += 1
        if text:
            faults.append(f"{number}: {told}\n{text}")
        if peak() - max(before, base) > 1 << 30:
            faults.append(f"{number}: {told}\ntook {(peak() - before) >> 20} MB")
        here = sorted(path.name for path in home.iterdir())
        within = sorted(path.name for path in (home / "theirs").iterdir())
        outside = contents(home / "outside") == {"secret": b"mine"}
        if not outside or here != ["outside", "theirs"] or within != ["artefact"]:
            faults.append(f"{number}: {told}\nwrote elsewhere: {here} {within}")
            break
    return {
        "outcomes": dict(outcomes),
        "longest": longest,
        "memory": peak() - base,
        "faults": faults,
    }


if __name__ == "__main__":
    name, artefact, home, seed, count = sys.argv[1:]
    found = main(name, Path(artefact), Path(home), int(seed), int(count))
    sys.stdout.write(json.dumps(found) + "\n")
