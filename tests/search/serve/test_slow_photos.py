"""Uploads that would take minutes to decode: the server lives on, and stops when told to."""

import resource
import signal
import threading
from contextlib import suppress

import pytest

from serving import serving
from support import PATIENCE, wait_for

SLOW = b"P3\n8 8\n255\n" + b"# a\n" * 1_000_000 + b"1 " * 192  # minutes of Python
PHOTOS = 24


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_server_full_of_slow_photos_stops(index_folder, tmp_path, number, code):
    with serving(index_folder, tmp_path) as server:

        def send() -> None:
            with suppress(Exception):
                server.ask("/search", "POST", SLOW, content_type="image/x-portable-pixmap")

        askers = [threading.Thread(target=send) for _ in range(PHOTOS)]
        for asker in askers:
            asker.start()
        # one is being decoded and the others wait
        wait_for(lambda: server.metric("crosstill_queue") > PHOTOS / 2)
        server.process.send_signal(number)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert server.process.wait(PATIENCE) == code
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        for asker in askers:
            asker.join()
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert taken < PHOTOS, taken  # seconds of CPU: two for each photo, if all were decoded


def test_a_slow_photo_is_the_asker_s_mistake(index_folder, tmp_path):
    with serving(index_folder, tmp_path) as server:
        answer = server.ask("/search", "POST", SLOW, content_type="image/x-portable-pixmap")
        assert (answer.status, answer.json["error"]) == (400, "photo: takes too long to decode")
        assert server.ask("/readyz").status == 200
