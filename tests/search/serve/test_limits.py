"""The clocks of one request, on a loop whose time jumps to what is due next."""

import asyncio
import selectors
from dataclasses import replace
from types import SimpleNamespace

import pytest

from crosstill.search.serve.limits import Guard, Settings, secured
from crosstill.search.serve.load import Metrics

SMALL = replace(Settings(), body_seconds=3, body_rate=100, timeout=3, body=5000)


class Jumping(asyncio.SelectorEventLoop):
    """An event loop that never waits: what others would sleep through has passed at once."""

    def __init__(self):
        self.now, selector = 0.0, selectors.DefaultSelector()
        super().__init__(selector)
        look = selector.select

        def jump(timeout=None):
            self.now += timeout or 0.0
            return look(0)

        selector.select = jump

    def time(self):
        return self.now


class Searcher(SimpleNamespace):
    generation = 1

    def __len__(self):
        return 0


def exchange(app, pieces=(), pause=0.0, settings=SMALL, at_once=0):
    """Status, headers, body and seconds of an answer to a body in pieces, some at once."""
    sent, waiting = [], list(pieces)

    async def receive():
        await asyncio.sleep(pause if len(pieces) - len(waiting) >= at_once else 0)
        piece = waiting.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(waiting)}

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost"), *([(b"transfer-encoding", b"chunked")] if pieces else [])]
    scope = {"type": "http", "method": "POST", "headers": headers, "query_string": b""}
    guard = Guard(app, settings, Metrics(Searcher()))
    with asyncio.Runner(loop_factory=Jumping) as runner:
        runner.run(guard(scope, receive, send))
        seconds = runner.get_loop().time()
    assert guard.bodies.inside == 0
    body = b"".join(message["body"] for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), body, seconds


async def reader(scope, receive, send):
    """Answers with the length of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message["more_body"]
    await answer(send, b"%d" % size)


async def answer(send, body):
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": body})


def test_a_body_that_keeps_its_pace_may_take_longer():
    status, headers, body, seconds = exchange(reader, [b"x" * 100] * 12, pause=0.5)
    assert (status, body) == (200, b"1200")
    assert seconds == pytest.approx(6) and seconds > SMALL.body_seconds
    assert b"connection" not in headers


def test_a_body_that_drips_is_cut():
    status, headers, body, seconds = exchange(reader, [b"x"] * 100, pause=0.5)
    assert status == 408 and b"in time" in body
    assert headers[b"connection"] == b"close"
    assert seconds == pytest.approx(SMALL.body_seconds, abs=0.1)


def test_what_came_fast_earns_no_time_for_a_drip():
    pieces = [b"x" * 4000] + [b"x"] * 100  # 4,000 bytes at that rate are forty seconds
    status, _, body, seconds = exchange(reader, pieces, pause=0.5, at_once=1)
    assert status == 408 and b"in time" in body
    assert seconds == pytest.approx(SMALL.body_seconds, abs=0.1)


def test_a_body_is_counted_to_the_byte():
    assert exchange(reader, [b"x" * 2500] * 2)[0] == 200


@pytest.mark.parametrize("pieces", [[b"x" * 5001], [b"x" * 2500, b"x" * 2500, b"x"]])
def test_one_byte_too_many_is_refused(pieces):
    status, headers, body, _ = exchange(reader, pieces)
    assert status == 413 and b"5000 bytes" in body and headers[b"connection"] == b"close"


def test_the_time_to_think_begins_behind_the_body():
    async def thinker(scope, receive, send):
        while (await receive())["more_body"]:
            pass
        await asyncio.sleep(2)
        await answer(send, b"thought")

    status, _, _, seconds = exchange(thinker, [b"x" * 100] * 5, pause=0.5)
    assert status == 200 and seconds == pytest.approx(4.5)

    async def slow(scope, receive, send):
        await asyncio.sleep(50)

    status, headers, _, seconds = exchange(slow)
    assert status == 503 and headers[b"retry-after"] == b"1"
    assert seconds == pytest.approx(SMALL.timeout)


def test_an_answer_that_has_begun_is_not_stopped():
    async def writer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        await asyncio.sleep(50)
        await send({"type": "http.response.body", "body": b"late"})

    assert exchange(writer)[2] == b"late"


def test_a_timeout_within_the_application_is_its_own():
    async def broken(scope, receive, send):
        raise TimeoutError("of a disk")

    with pytest.raises(TimeoutError, match="of a disk"):
        exchange(broken)


def test_headers_that_an_answer_has_are_left_alone():
    found = dict(secured([(b"Cache-Control", b"private"), (b"x-frame-options", b"SAMEORIGIN")]))
    assert found[b"Cache-Control"] == b"private" and b"cache-control" not in found
    assert found[b"x-frame-options"] == b"SAMEORIGIN"
    assert found[b"x-content-type-options"] == b"nosniff"
