"""Who waits for whom: batches, their bounds, and what happens beyond them (R24)."""

import asyncio
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from crosstill.search.serve.load import Batcher, Gate, Overloaded
from serving import form, serving
from support import PATIENCE, wait_for


class Slow:
    """Doubles numbers, one batch at a time, when it is let."""

    def __init__(self):
        self.batches, self.go = [], threading.Event()
        self.go.set()

    def __call__(self, numbers):
        self.batches.append(list(numbers))
        assert self.go.wait(PATIENCE)
        if None in numbers:
            raise ValueError("a hole")
        return [2 * number if number >= 0 else ValueError("negative") for number in numbers]


def run(body, workers=1):
    """Run a coroutine function with a `Slow` and a batcher of at most four."""

    async def main():
        slow = Slow()
        batcher = Batcher(slow, workers, most=4)
        await body(slow, batcher)
        batcher.close()

    asyncio.run(main())


async def started(batcher, numbers):
    """Ask for all of these at once; when this returns, a worker that is idle has its batch."""
    tasks = [asyncio.create_task(batcher(number)) for number in numbers]
    await asyncio.sleep(0)
    return tasks


def test_a_query_that_is_alone_starts_at_once():
    async def body(slow, batcher):
        for number in range(3):
            assert await batcher(number) == 2 * number
        assert slow.batches == [[0], [1], [2]]

    run(body)


def test_a_batch_is_what_has_queued_meanwhile():
    async def body(slow, batcher):
        slow.go.clear()
        first = await started(batcher, [0])
        later = await started(batcher, [1, 2, 3, 4, 5, 6])
        slow.go.set()
        assert await asyncio.gather(*first, *later) == [0, 2, 4, 6, 8, 10, 12]
        assert slow.batches == [[0], [1, 2, 3, 4], [5, 6]]

    run(body)


def test_every_idle_worker_takes_what_is_there():
    async def body(slow, batcher):
        slow.go.clear()
        tasks = [*await started(batcher, [0]), *await started(batcher, [1])]
        tasks += await started(batcher, [2, 3])
        while len(slow.batches) < 2:
            await asyncio.sleep(0.001)
        assert sorted(slow.batches) == [[0], [1]]
        slow.go.set()
        assert await asyncio.gather(*tasks) == [0, 2, 4, 6]
        assert slow.batches[2:] == [[2, 3]]

    run(body, workers=2)


def test_who_has_gone_is_not_computed():
    async def body(slow, batcher):
        slow.go.clear()
        first = await started(batcher, [0])
        later = await started(batcher, [1, 2, 3])
        later[1].cancel()
        first[0].cancel()  # which is under way
        await asyncio.sleep(0)
        slow.go.set()
        assert [await later[0], await later[2]] == [2, 6]
        assert slow.batches == [[0], [1, 3]]

    run(body)


def test_an_error_reaches_all_of_its_batch_and_no_other():
    async def body(slow, batcher):
        slow.go.clear()
        first = await started(batcher, [0])
        later = await started(batcher, [1, None, 3, 4, 5])
        slow.go.set()
        found = await asyncio.gather(*first, *later, return_exceptions=True)
        assert found[0] == 0 and found[5] == 10
        assert all(isinstance(error, ValueError) for error in found[1:5])
        assert await batcher(7) == 14

    run(body)


def test_an_error_in_place_of_an_answer_is_for_one_asker_alone():
    async def body(slow, batcher):
        slow.go.clear()
        first = await started(batcher, [0])
        later = await started(batcher, [1, -2, 3])
        slow.go.set()
        found = await asyncio.gather(*first, *later, return_exceptions=True)
        assert [found[0], found[1], found[3]] == [0, 2, 6]
        assert str(found[2]) == "negative"

    run(body)


def test_what_waits_when_the_server_stops_ends_too():
    async def body(slow, batcher):
        slow.go.clear()
        tasks = [*await started(batcher, [0]), *await started(batcher, [1])]
        batcher.close()
        slow.go.set()
        assert await tasks[0] == 0
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]

    run(body)


def test_a_gate_holds_so_many():
    gate = Gate(3)
    with gate.enter(), gate.enter(2):
        assert gate.inside == 3
        with pytest.raises(Overloaded), gate.enter():
            pass
        assert gate.inside == 3
    assert gate.inside == 0
    with pytest.raises(ZeroDivisionError), gate.enter():
        assert 1 / 0
    assert gate.inside == 0


def test_concurrent_answers_equal_single_ones(server, photo):
    """Long and short, some with another number of results, some a photo, all at once."""
    words = ["circle", "a red circle " * 30, "one blue square and two green circles", "x", "雪"]
    asked = [f"/search?q={word.replace(' ', '+')}&top={top}" for word in words for top in (3, 7)]
    asked = [target.encode("utf-8").decode("latin-1") for target in asked]
    asked = [target.replace("雪".encode().decode("latin-1"), "%E9%9B%AA") for target in asked]
    single = [answer(server.ask(target)) for target in asked]
    pictured = answer(server.ask("/search", "POST", **form(photo)))
    with ThreadPoolExecutor(24) as clients:
        batches = server.metric("crosstill_batch_size_count")
        texts = [clients.submit(server.ask, target) for target in asked * 4]
        photos = [clients.submit(server.ask, "/search", "POST", **form(photo)) for _ in range(3)]
        together = [answer(task.result()) for task in texts]
        assert all(same(answer(task.result()), pictured) for task in photos)
    for found, alone in zip(together, single * 4, strict=True):
        assert same(found, alone)
    # fewer batches than queries: some were computed together
    assert server.metric("crosstill_batch_size_count") - batches < len(together)


def answer(reply):
    assert reply.status == 200, reply
    return [(result["id"], result["score"]) for result in reply.json["results"]]


def same(found, alone):
    ids = [key for key, _ in found] == [key for key, _ in alone]
    scores = zip(found, alone, strict=True)
    return ids and all(abs(a - b) < 2e-5 for (_, a), (_, b) in scores)


def test_overload_is_refused_and_passes(index_folder, tmp_path, photo):
    """A queue of four, forty clients until some were told to come back; no accepted one is lost."""
    replies, seen = [], threading.Event()

    def hammer():
        while not seen.is_set():
            replies.append(server.ask("/search", "POST", **form(photo)))

    with serving(index_folder, tmp_path, "--queue", 4) as server:
        with ThreadPoolExecutor(40) as clients:
            tasks = [clients.submit(hammer) for _ in range(40)]
            try:
                wait_for(lambda: {200, 503} <= {found.status for found in list(replies)})
            finally:
                seen.set()
            for task in tasks:
                task.result()
        assert {found.status for found in replies} == {200, 503}
        for found in replies:
            if found.status == 503:
                assert found.headers["retry-after"] == "1"
                assert found.json == {"error": "too many requests at once; try again soon"}
            else:
                assert len(found.json["results"]) == 10
        assert server.metric('crosstill_rejected_total{limit="busy"}') >= 1
        wait_for(lambda: server.metric("crosstill_queue") == 0)
        assert server.search(q="a circle")["results"]
        assert "Traceback" not in server.log()


def test_what_takes_too_long_is_given_up(index_folder, tmp_path, photo):
    """Photos of 16 million pixels, a tenth of a second for each."""
    out = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(out, "PNG")
    with serving(index_folder, tmp_path, "--timeout", 0.1) as server:
        with ThreadPoolExecutor(3) as clients:
            asked = [
                clients.submit(server.ask, "/search", "POST", **form(out.getvalue()))
                for _ in range(3)
            ]
            for task in asked:
                found = task.result()
                assert found.status == 503 and found.headers["retry-after"] == "1"
                assert "took too long" in found.json["error"]
        # on a busy machine even these may take a tenth of a second
        wait_for(lambda: server.ask("/search?q=a+circle").status == 200)
        wait_for(lambda: server.ask("/search", "POST", **form(photo)).status == 200)
        wait_for(lambda: server.metric("crosstill_queue") == 0)
