"""The clocks of one request, made fast."""

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from crosstill.search.serve.limits import Guard, secured
from crosstill.search.serve.metrics import Metrics
from crosstill.search.serve.settings import Settings

FAST = replace(Settings(), body_seconds=0.3, body_rate=1000, timeout=0.3, body=5000)


class Searcher(SimpleNamespace):
    generation = 1

    def __len__(self):
        return 0


def exchange(app, pieces=(), pause=0.0, settings=FAST, at_once=0):
    """Status, headers and body of an answer to a body that comes in pieces, some at once."""
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
    asyncio.run(guard(scope, receive, send))
    assert guard.bodies.inside == 0
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m["body"] for m in sent[1:])


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
    began = time.monotonic()
    status, headers, body = exchange(reader, [b"x" * 100] * 12, pause=0.05)
    assert (status, body) == (200, b"1200")
    assert time.monotonic() - began > FAST.body_seconds
    assert b"connection" not in headers


def test_a_body_that_drips_is_cut():
    status, headers, body = exchange(reader, [b"x"] * 100, pause=0.05)
    assert status == 408 and b"in time" in body
    assert headers[b"connection"] == b"close"


def test_what_came_fast_earns_no_time_for_a_drip():
    began = time.monotonic()
    pieces = [b"x" * 4000] + [b"x"] * 100  # 4,000 bytes at that rate are four seconds
    status, _, body = exchange(reader, pieces, pause=0.05, at_once=1)
    assert status == 408 and b"in time" in body
    assert time.monotonic() - began < 3


def test_a_body_is_counted_to_the_byte():
    assert exchange(reader, [b"x" * 2500] * 2)[0] == 200


@pytest.mark.parametrize("pieces", [[b"x" * 5001], [b"x" * 2500, b"x" * 2500, b"x"]])
def test_one_byte_too_many_is_refused(pieces):
    status, headers, body = exchange(reader, pieces)
    assert status == 413 and b"5000 bytes" in body and headers[b"connection"] == b"close"


def test_the_time_to_think_begins_behind_the_body():
    async def thinker(scope, receive, send):
        while (await receive())["more_body"]:
            pass
        await asyncio.sleep(0.2)
        await answer(send, b"thought")

    assert exchange(thinker, [b"x" * 100] * 5, pause=0.05)[0] == 200

    async def slow(scope, receive, send):
        await asyncio.sleep(5)

    began = time.monotonic()
    status, headers, _ = exchange(slow)
    assert status == 503 and headers[b"retry-after"] == b"1"
    assert time.monotonic() - began < 2


def test_an_answer_that_has_begun_is_not_stopped():
    async def writer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        await asyncio.sleep(0.5)
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
