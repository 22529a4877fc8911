"""Sixty-four clients while attackers of every kind are at the server: docs/reliability.md."""

import asyncio
import multiprocessing
import resource
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving import form, serving
from support import PATIENCE

MIB = 2**20
CLIENTS, SECONDS = 64, 60
RISE = 300 * MIB  # of resident memory: bodies and photos held at once, and what goes with them
POST = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


async def attacker(port, source, head, piece, pause, answers):
    """Connect, send a head, then pieces until the server ends it; again and again."""
    while True:
        writer = None
        try:
            there = asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
            reader, writer = await asyncio.wait_for(there, 10)
            writer.write(head)
            answer = asyncio.ensure_future(reader.read(64))
            while not answer.done():
                if piece:
                    writer.write(piece)
                    await asyncio.wait_for(writer.drain(), 30)
                await asyncio.wait([answer], timeout=pause)
            answers[answer.result()[9:12].decode() or "cut"] += 1
        except (OSError, TimeoutError):
            answers["cut"] += 1
        finally:
            if writer:
                writer.close()
        await asyncio.sleep(1)


async def besiege(port, seconds, told):
    kinds = {  # how many, from which address, their head, what follows and after which pause
        "idle": (1000, "127.0.1.{}", b"", b"", 60),
        "half a head": (100, "127.0.2.1", b"GET /search?q=", b"x", 1),
        "slow body": (100, "127.0.3.1", POST + b"Content-Length: 100000\r\n\r\n", b"x", 1),
        "bytes in chunks": (8, "127.0.4.1", CHUNKED, b"1\r\na\r\n" * 5000, 0.001),
        "huge": (4, "127.0.5.1", CHUNKED, b"10000\r\n%b\r\n" % bytes(0x10000), 0.001),
        "two lengths": (4, "127.0.6.1", CHUNKED[:-2] + b"Content-Length: 4\r\n\r\n", b"", 10),
    }
    answers = {kind: Counter() for kind in kinds}
    tasks = [
        asyncio.create_task(
            attacker(port, source.format(1 + n % 4), head, piece, pause, answers[kind])
        )
        for kind, (count, source, head, piece, pause) in kinds.items()
        for n in range(count)
    ]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    told.send({kind: dict(counted) for kind, counted in answers.items()})


def attack(port, seconds, told):
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, most), most))
    asyncio.run(besiege(port, seconds, told))


def client(server, number, photo, photo_id, until, seconds, statuses):
    """Words mostly, sometimes a photo or a thumbnail, about one request a second."""
    for turn in range(10**6):
        if time.monotonic() > until:
            return
        began = time.monotonic()
        try:
            if turn % 10 == 3:
                found = server.ask("/search", "POST", **form(photo)).status
            elif turn % 10 == 7:
                found = server.ask(f"/thumbnails/{photo_id}").status
            else:
                found = server.ask(f"/search?q=number+{number}+of+{turn}").status
        except (OSError, IndexError) as error:  # no answer
            found = f"none ({type(error).__name__})"
        statuses[found] += 1
        seconds.append(time.monotonic() - began)
        time.sleep(max(0.0, 1 - seconds[-1]))


def crowd(server, photo, photo_id, duration):
    """Statuses and sorted seconds of all requests of all clients."""
    seconds, statuses = [], Counter()
    with ThreadPoolExecutor(CLIENTS) as clients:
        until = time.monotonic() + duration
        for task in [
            clients.submit(client, server, n, photo, photo_id, until, seconds, statuses)
            for n in range(CLIENTS)
        ]:
            task.result()
    return statuses, sorted(seconds)


@pytest.mark.slow
def test_clients_are_answered_under_siege(index_folder, photo, photo_id, tmp_path, capsys):
    with serving(index_folder, tmp_path) as server:
        _, usual = crowd(server, photo, photo_id, 10)
        before = server.memory()
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        attackers = spawn.Process(target=attack, args=(server.port, SECONDS + 5, theirs))
        attackers.start()
        try:
            time.sleep(5)
            statuses, seconds = crowd(server, photo, photo_id, SECONDS)
            assert ours.poll(60)
            answers = ours.recv()
        finally:
            attackers.kill()
            attackers.join()
        rise = server.peak() - before
        p95, quiet = (row[int(0.95 * len(row))] for row in (seconds, usual))
        with capsys.disabled():
            sys.stdout.write(
                f"\n{sum(statuses.values())} requests: {dict(statuses)}; p95 {1000 * p95:.0f} ms "
                f"({1000 * quiet:.0f} ms in peace), memory +{rise / MIB:.0f} MiB\n{answers}\n"
            )
        assert set(statuses) <= {200, 503} and statuses[200] > 0.95 * sum(statuses.values())
        assert rise < RISE
        assert set(answers["slow body"]) <= {"408", "503", "cut"}
        assert set(answers["bytes in chunks"]) <= {"413", "503", "cut"}
        assert set(answers["huge"]) <= {"413", "503", "cut"}
        assert set(answers["two lengths"]) <= {"400", "503", "cut"}
        assert all(answers.values())
        assert server.ask("/readyz").status == 200
        server.process.terminate()
        assert server.process.wait(PATIENCE) == 0
        assert "Traceback" not in server.log()
