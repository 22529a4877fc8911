"""Requests leave nothing behind: R28."""

import asyncio
import http.client
from dataclasses import replace

import pytest

from crosstill.search.serve.limits import Settings
from crosstill.search.serve.photo_store import Store
from serving import form, serving
from support import PATIENCE

KIB, MIB = 2**10, 2**20


def ask_many(server, photo, count, start=0):
    """Different words each time; every tenth request is a photo, another tenth a thumbnail."""
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    request = form(photo)
    for number in range(start, start + count):
        if number % 10 == 0:
            kind = {"Content-Type": request["content_type"]}
            line.request("POST", "/search", request["body"], kind)
        elif number % 10 == 1:
            line.request("GET", f"/thumbnails/{number:064x}")
        else:
            line.request("GET", f"/search?q=number+{number}+of+many")
        answer = line.getresponse()
        answer.read()
        assert answer.status == (404 if number % 10 == 1 else 200)
    line.close()


def check_slope(server, photo, warm, count):
    ask_many(server, photo, warm)
    before = server.memory()
    ask_many(server, photo, count, start=warm)
    grown = server.memory() - before
    # what the allocator itself moves by, beside less than 1 KiB a request
    assert grown < count * KIB + 2 * MIB, f"{grown / count:.0f} bytes a request"


def test_memory_does_not_grow_with_requests(index_folder, photo, tmp_path):
    with serving(index_folder, tmp_path) as server:
        check_slope(server, photo, warm=200, count=400)


@pytest.mark.slow
def test_memory_does_not_grow_over_20_000_requests(index_folder, photo, tmp_path):
    with serving(index_folder, tmp_path) as server:
        check_slope(server, photo, warm=2000, count=20_000)


def test_thumbnails_in_memory_are_bounded(searcher):
    every = [hit.id for hit in searcher.find(searcher.encode_texts(["a"]), 40)[0]]

    async def sizes(limit):
        store = Store(searcher, replace(Settings(), thumbnails=limit))
        found = [len((await store.thumbnail(key)).data) for key in every]
        again = [len((await store.thumbnail(key)).data) for key in every]
        store.close()
        assert again == found
        return store, found

    _, found = asyncio.run(sizes(MIB))
    store, _ = asyncio.run(sizes(sum(found) // 4))
    kept = sum(len(picture.data) for picture in store._kept.values())
    assert 0 < kept == store._size <= sum(found) // 4
    assert list(store._kept) == every[-len(store._kept) :]
