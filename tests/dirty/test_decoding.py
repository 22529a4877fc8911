"""The processes that decode photos: killed in time, replaced, never left behind."""

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bombs
import numpy as np
import pytest
import slow_files
from mutants import encoded, picture
from PIL import Image

from crosstill import decoding, pixels, rasters
from crosstill.data import scenes
from crosstill.errors import ImageError
from crosstill.pixels import failure_class
from support import PATIENCE, wait_for

SLOW = b"P3\n8 8\n255\n" + b"# a\n" * 1_000_000 + b"1 " * 192  # minutes of Python


def reason(data: bytes) -> str:
    try:
        pixels.decode(data, "photo")
    except ImageError as error:
        return error.reason
    return ""


def children(pid: int) -> set[int]:
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        found |= set(map(int, (task / "children").read_text().split()))
    return found


def state(pid: int) -> str:
    """One letter as `ps` has it; "" of a process that is gone."""
    try:
        return re.search(r"State:\s*(\w)", Path(f"/proc/{pid}/status").read_text())[1]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def cpu(pid: int) -> float:
    """Seconds of a processor that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_slow_photo_is_one_photo_and_the_next_is_read():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert reason(SLOW) == "takes too long to decode"
    assert failure_class("takes too long to decode") == "too-slow"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert 1.5 < after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert reason(encoded(picture(), "PNG")) == ""
    assert all(state(child) != "Z" for child in children(os.getpid()))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name.startswith("com") else pytest.mark.slow)
        for name in slow_files.FILES
    ],
)
def test_no_file_takes_minutes(name):
    make, reasons = slow_files.FILES[name]
    data = make()
    began = time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    said = reason(data)
    decoding.stop()  # so that what the worker took is counted
    took = time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - began
    assert took < 12, said
    assert any(said.startswith(each) if each else not said for each in reasons), said


def test_a_photo_that_swells_is_refused_and_the_next_is_read():
    tile = {322: (4, 1, 60_000), 323: (4, 1, 60_000), 324: (4, 1, 8), 325: (4, 1, 64)}
    plain = {t: v for t, v in bombs.plain(8, 8, 8, 64).items() if t not in (273, 278, 279)}
    said = reason(bombs.tiff(plain | tile, bytes(64)))  # one tile of 3.6 GB around 8 x 8 pixels
    assert said.startswith(("too much memory", "corrupt", "truncated"))
    assert reason(encoded(picture(), "PNG")) == ""


def test_a_worker_that_was_killed_is_replaced():
    assert reason(encoded(picture(), "PNG")) == ""
    for worker in children(os.getpid()):
        if b"crosstill.rasters" in Path(f"/proc/{worker}/cmdline").read_bytes():
            os.kill(worker, signal.SIGKILL)
    said = {reason(encoded(picture(), "PNG")) for _ in range(8)}
    assert said <= {"", "too much memory"} and reason(encoded(picture(), "PNG")) == ""


def test_many_threads_share_the_workers_and_get_their_own_photos():
    photos = [scenes.scene(0, number)[0] for number in range(40)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda data: pixels.decode(data, "photo"), photos * 2))
    assert len({each.tobytes() for each in found}) == 40
    for one, other in zip(found[:40], found[40:], strict=True):
        assert np.array_equal(one, other)


def test_workers_end_with_their_parent(tmp_path):
    code = (
        "import sys, threading; from crosstill import pixels\n"
        "slow, small = (open(path, 'rb').read() for path in sys.argv[1:])\n"
        "threading.Thread(target=pixels.decode, args=(slow, '')).start()\n"
        "pixels.decode(small, ''); print('ready', flush=True); pixels.decode(slow, '')"
    )
    (tmp_path / "slow").write_bytes(SLOW)
    (tmp_path / "small").write_bytes(encoded(picture(), "PNG"))
    command = [sys.executable, "-c", code, str(tmp_path / "slow"), str(tmp_path / "small")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"ready\n"
        workers = wait_for(lambda: children(parent.pid))
        parent.kill()
    wait_for(lambda: not any(state(worker) not in ("", "Z") for worker in workers))


def test_an_interruption_kills_what_is_being_decoded():
    decoding.stop()
    with pytest.raises(KeyboardInterrupt), decoding.in_threads(2) as threads:
        asked = [threads.submit(reason, SLOW) for _ in range(60)]
        # both in the middle: on a busy machine one may reach its limit before the other has begun
        wait_for(lambda: sum(0.3 < cpu(child) < 1 for child in children(os.getpid())) == 2)
        raise KeyboardInterrupt
    begun = [one for one in asked if not one.cancelled()]
    ended = [one for one in begun if not one.exception() and one.result() == rasters.OVERTIME]
    stopped = [one for one in begun if one not in ended]
    assert len(stopped) == 2 and len(begun) < 60
    for one in stopped:  # an error where the worker's line was closed before it was read
        assert one.exception() or one.result() == "not decoded, since the work was stopped"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_cache_of_slow_photos_stops_at_once(tmp_path, number):
    photos = tmp_path / "photos"
    photos.mkdir()
    for count in range(80):  # 160 CPU seconds of them
        (photos / f"{count}.ppm").write_bytes(SLOW + b"%d" % count)
        (photos / f"{count}.txt").write_text("a photo")
    crosstill = Path(sys.executable).parent / "crosstill"
    command = [crosstill, "cache", "none", photos, "--out", tmp_path / "cache"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE)
    wait_for(lambda: run.poll() is None and len(children(run.pid)) >= 2)
    workers = children(run.pid)
    run.send_signal(number)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run.communicate(timeout=PATIENCE)
    assert run.returncode in (130, -number, 128 + number)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert taken < 40, taken  # 80 photos would take 160
    wait_for(lambda: not any(state(worker) not in ("", "Z") for worker in workers))


def test_a_forked_process_has_workers_of_its_own():
    data = encoded(picture(), "PNG")
    assert reason(data) == ""
    code = (
        "import os, sys; from crosstill import pixels\n"
        "data = sys.stdin.buffer.read(); pixels.decode(data, '')\n"
        "child = os.fork()\n"
        "for _ in range(20): assert pixels.decode(data, '').shape == (24, 32, 3)\n"
        "assert not child or not os.waitpid(child, 0)[1]"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], input=data, check=True)


def test_photos_wait_for_memory():
    budget, held, most = decoding.Budget(100), [0], [0]
    lock = threading.Lock()

    def take(size: int) -> None:
        with budget.held(size, "photo"):
            with lock:
                held[0] += size
                most[0] = max(most[0], held[0])
            time.sleep(0.001)
            with lock:
                held[0] -= size

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(take, [60, 40, 30, 100, 1] * 20))
    assert 60 <= most[0] <= 100
    with pytest.raises(ImageError, match="too much memory"), budget.held(101, "photo"):
        pass


@pytest.mark.slow
def test_large_photos_together_stay_within_the_budget(tmp_path):
    """Four at a time of 40 megapixels: 680 MB each at once, without a budget."""
    image = Image.new("RGBA", (8_000, 5_000), (9, 8, 7, 99))
    image.save(tmp_path / "large.png", compress_level=1)
    code = (
        "import re, sys, threading; from pathlib import Path; from crosstill import decoding\n"
        "decoding.BUDGET = 400 << 20\n"
        "from crosstill import pixels\n"
        "data = Path(sys.argv[1]).read_bytes(); size = pixels.Preprocess(size=(32, 32))\n"
        "work = [threading.Thread(target=pixels.load, args=(data, '', size)) for _ in range(4)]\n"
        "[one.start() for one in work]; [one.join() for one in work]\n"
        "own = Path('/proc/self/status').read_text()\n"
        "print(re.search(r'VmHWM:\\s*(\\d+)', own)[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "large.png")],
        capture_output=True,
        check=True,
        text=True,
    )
    assert int(done.stdout) < 330_000  # KiB: one photo's pixels, not four


def test_items_come_in_order_and_never_too_far_ahead():
    begun = []

    def load(item):
        begun.append(item)
        time.sleep(0.001 * (item % 3))
        return -item

    for count, loaded in enumerate(decoding.ahead(load, range(40), window=5)):
        assert loaded == -count and len(begun) <= count + 1 + 5
    batches = list(decoding.batches(load, list(range(7)), 3))
    assert batches == [[(i, -i) for i in rows] for rows in ([0, 1, 2], [3, 4, 5], [6])]


def test_an_error_comes_where_its_item_would_and_what_waits_is_cancelled():
    begun = []

    def load(item):
        begun.append(item)
        if item == 3:
            raise ValueError
        return item

    loaded = []
    with pytest.raises(ValueError):
        loaded.extend(decoding.ahead(load, range(1000), window=8))
    assert loaded == [0, 1, 2]
    assert len(begun) < 1000


def test_an_error_of_who_uses_them_cancels_what_waits():
    begun = []

    def load(item):
        begun.append(item)
        time.sleep(0.01)
        return item

    with pytest.raises(KeyError):
        for _ in decoding.batches(load, list(range(1000)), 4):
            raise KeyError
    assert not [each for each in threading.enumerate() if each.name.startswith("decode")]
    assert len(begun) < 20
