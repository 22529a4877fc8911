"""Bodies without end, and clients that never finish: R22 and R23."""

import select
import socket
import time
from contextlib import ExitStack, suppress

import pytest

from serving import form, last_words, reply, serving
from support import PATIENCE, wait_for

MIB = 2**20
POST = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"


def pour(line: socket.socket, head: bytes, total: int) -> None:
    """Send so many bytes as chunks, until an answer comes."""
    piece = b"10000\r\n%b\r\n" % (b"\0" * 0x10000)
    line.sendall(head)
    for _ in range(0, total, 0x10000):
        if select.select([line], [], [], 0)[0]:
            return
        try:
            line.sendall(piece)
        except OSError:  # it came while this waited to be sent
            return


def multipart(head: bytes) -> tuple[bytes, bytes]:
    """The same head for a form, with the beginning of its part."""
    whole = form(b"")
    start = whole["body"].partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    head = head.replace(b"image/png", whole["content_type"].encode())
    return head, start


@pytest.fixture(scope="module")
def fresh(index_folder, tmp_path_factory):
    """A server whose memory no other test has used, and its folder for temporary files."""
    folder = tmp_path_factory.mktemp("fresh")
    (folder / "scratch").mkdir()
    with serving(index_folder, folder, TMPDIR=folder / "scratch") as running:
        running.search(q="a circle")
        yield running, folder / "scratch"


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        ("raw", b"/search"),
        ("form", b"/"),
        ("raw", b"/nowhere"),
        pytest.param("form", b"/search", marks=pytest.mark.slow),
        pytest.param("raw", b"/", marks=pytest.mark.slow),
        pytest.param("form", b"/nowhere", marks=pytest.mark.slow),
    ],
)
def test_a_stream_of_300_mb_is_cut(fresh, kind, target):
    """Chunked: no header says how much will come."""
    server, scratch = fresh
    head = POST.replace(b"/search", target) + b"Transfer-Encoding: chunked\r\n\r\n"
    if kind == "form":
        head, start = multipart(head)
        head += b"%x\r\n%b\r\n" % (len(start), start)
    before, read = server.memory(), server.metric("crosstill_received_bytes_total")
    with server.connect() as line:
        pour(line, head, 300 * MIB)
        found = reply(line)
        assert found.status == (404 if target == b"/nowhere" else 413), found
        assert found.headers["connection"] == "close"
        assert last_words(line) is not None
    assert server.metric("crosstill_received_bytes_total") - read <= 21 * MIB
    assert server.peak() - before < 64 * MIB
    assert list(scratch.iterdir()) == []
    assert server.search(q="a circle")["results"]
    assert "Traceback" not in server.log()


def test_a_length_over_the_limit_is_refused_unread(server):
    before = server.metric("crosstill_received_bytes_total")
    with server.connect() as line:
        line.sendall(POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % (20 * MIB + 1))
        assert reply(line).status == 413
    head, _ = multipart(POST.replace(b"/search", b"/"))
    with server.connect() as line:
        line.sendall(head + b"Content-Length: %d\r\n\r\n" % (20 * MIB + 1))
        page = reply(line)
        assert page.status == 413 and page.headers["content-type"].startswith("text/html")
    assert server.metric("crosstill_received_bytes_total") - before < 4096


def test_a_body_up_to_the_limit_is_read(server, photo):
    """Whatever follows a PNG's end is no part of it."""
    whole = photo + b"\0" * (20 * MIB - len(photo))
    assert server.ask("/search", "POST", whole, content_type="image/png").status == 200
    whole = photo + b"\0" * (20 * MIB - 1000 - len(photo))
    assert server.ask("/search", "POST", **form(whole)).status == 200


def test_bodies_held_at_once_are_bounded(server, photo):
    """Five bodies of 20 MiB that lack their last byte: more than an address may have."""
    with ExitStack() as stack:
        lines = [stack.enter_context(server.connect()) for _ in range(5)]
        for line in lines:
            line.setblocking(False)
        left = {
            line: memoryview(
                POST + b"Content-Length: %d\r\n\r\n" % (20 * MIB) + b"\0" * (20 * MIB - 1)
            )
            for line in lines
        }
        turned_away = []
        while not turned_away:
            turned_away, writable, _ = select.select(
                list(left), [line for line in left if left[line]], [], PATIENCE
            )
            assert turned_away or writable
            for line in writable:
                left[line] = left[line][line.send(left[line][: 2**20]) :]
        turned_away[0].setblocking(True)
        found = reply(turned_away[0])
        assert found.status == 503 and found.headers["retry-after"] == "1"
        assert server.ask("/search", "POST", **form(photo)).status in (200, 503)
    wait_for(lambda: server.ask("/search", "POST", **form(photo)).status == 200)


@pytest.mark.slow
@pytest.mark.parametrize("to_the_end", [False, True])
def test_stalled_bodies_of_one_address_lock_no_other_out_and_are_cut(server, photo, to_the_end):
    """Eight bodies of 20 MiB, of which 200 bytes do not come: as much as the server will hold."""
    whole = form(photo)
    request = POST.replace(b"image/png", whole["content_type"].encode())
    request += b"Content-Length: %d\r\n\r\n" % len(whole["body"]) + whole["body"]
    with ExitStack() as stack:
        lines = [stack.enter_context(server.connect()) for _ in range(8)]
        for line in lines:
            with suppress(OSError):  # it was refused meanwhile
                line.sendall(POST + b"Content-Length: %d\r\n\r\n" % (20 * MIB))
                line.sendall(b"\0" * (20 * MIB - 200))
        with server.connect(source="127.0.0.2") as other:
            other.sendall(request)
            assert reply(other).status == 200
        if not to_the_end:  # which takes ten seconds; other tests see slow clients cut
            return
        statuses = [(last_words(line) or b"open")[:12] for line in lines]
    assert set(statuses) <= {b"HTTP/1.1 408", b"HTTP/1.1 503", b""}, statuses
    assert statuses.count(b"HTTP/1.1 408") == 4


def hang(server, stack, heads, bodies):
    """Clients of two addresses that have begun a head, their first or another, or a body."""
    sources = [f"127.0.0.{2 + number % 2}" for number in range(heads + bodies)]
    lines = [stack.enter_context(server.connect(source=source)) for source in sources]
    for number, line in enumerate(lines):
        if number >= heads:
            line.sendall(POST + b"Content-Length: 100000\r\n\r\n")
            continue
        if number % 3 == 0:
            line.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert reply(line).status == 200
        line.sendall(b"GET /search?q=")
    return lines


def latencies(server, count):
    """Sorted seconds of queries, one after the other, each on a connection of its own."""
    seconds = []
    for number in range(count):
        began = time.monotonic()
        server.search(q=f"a circle {number}")
        seconds.append(time.monotonic() - began)
    return sorted(seconds)


def silent(server, stack):
    """A client that keeps its connection and says nothing more."""
    line = stack.enter_context(server.connect())
    line.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert reply(line).status == 200
    return line


def deaf(server, stack):
    """A client that asks without end and reads no answer."""
    line = stack.enter_context(socket.socket())
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    line.connect(("127.0.0.1", server.port))
    line.setblocking(False)
    return line


def is_cut(line):
    """Whether a deaf client's next questions meet no one; until then they fill the line."""
    try:
        while True:
            line.send(b"GET /search?q=a&top=40 HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10)
    except BlockingIOError:
        return False
    except OSError:
        return True


def check_slow_clients(server, heads, bodies, queries):
    """Cut so many slow clients while queries are answered; return the queries' sorted seconds."""
    with ExitStack() as stack:
        began = time.monotonic()
        quiet, unheard = silent(server, stack), deaf(server, stack)
        lines = hang(server, stack, heads, bodies)
        crowded = []
        while len(crowded) < queries:
            crowded += latencies(server, 10)
            is_cut(unheard)
            for line in lines[::2]:  # every other one goes on, a byte at a time
                with suppress(OSError):
                    line.send(b"x")
        for line in lines:
            said = last_words(line)
            assert said is not None and said.startswith(b"HTTP/1.1 408 "), said
        assert time.monotonic() - began > 5  # they had a fair chance
        assert last_words(quiet) == b""
        wait_for(lambda: is_cut(unheard))
    assert server.search(q="a circle")["results"]
    return sorted(crowded)


def test_slow_clients_are_cut_and_hold_up_nobody(server):
    check_slow_clients(server, heads=50, bodies=10, queries=100)
    assert server.metric('crosstill_rejected_total{limit="slow head"}') >= 50
    assert server.metric('crosstill_rejected_total{limit="slow body"}') >= 10


@pytest.mark.slow
def test_five_hundred_slow_heads_and_a_hundred_slow_bodies(index_folder, tmp_path):
    with serving(index_folder, tmp_path) as server:
        usual = latencies(server, 500)
        crowded = check_slow_clients(server, heads=500, bodies=100, queries=500)
    # medians: what else the machine does may hold up any one query
    assert crowded[250] <= 2 * usual[250] + 0.01


HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


def healthy(server, source=""):
    """Whether /healthz is answered on a new connection from this address."""
    with server.connect(source=source) as line:
        line.sendall(HEALTH)
        return reply(line).status


def at_work(server, stack, *sources):
    """Twenty connections each, begun at once, whose clients have been told to go on sending."""
    lines = [stack.enter_context(server.connect(source=source)) for source in sources * 20]
    for line in lines:
        line.sendall(POST + b"Expect: 100-continue\r\nContent-Length: 100000\r\n\r\n")
    for line in lines:
        assert line.recv(65536).startswith(b"HTTP/1.1 100 ")
    return lines


def test_connections_are_bounded_by_the_files_a_process_may_open(index_folder, tmp_path):
    """Forty; an address may have half of them, and none that is at work is cut."""
    with serving(index_folder, tmp_path, files=140) as server, ExitStack() as stack:
        at_work(server, stack, "127.0.0.2", "127.0.0.3")
        with server.connect() as line:
            found = reply(line)
            assert found.status == 503 and found.headers["retry-after"] == "1"
            assert found.json == {"error": "too many connections; try again soon"}
            assert found.headers["x-content-type-options"] == "nosniff"
        stack.close()
        wait_for(lambda: server.ask("/healthz").status != 503)
        assert server.metric('crosstill_rejected_total{limit="connections"}') >= 1


@pytest.mark.parametrize("to_the_end", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_address_cannot_take_all_connections(index_folder, tmp_path, to_the_end):
    with serving(index_folder, tmp_path, files=140) as server, ExitStack() as stack:
        lines = at_work(server, stack, "127.0.0.2")
        assert healthy(server) == 200
        with server.connect(source="127.0.0.2") as line:
            assert reply(line).status == 503
        for line in lines if to_the_end else ():
            assert last_words(line).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("count", [250, pytest.param(1000, marks=pytest.mark.slow)])
def test_connections_that_idle_make_room(index_folder, tmp_path, count):
    """So many where forty fit, opened again as soon as they are cut, some with half a head."""
    with serving(index_folder, tmp_path, files=140) as server, ExitStack() as stack:
        lines = []
        for number in range(count):
            lines.append(stack.enter_context(server.connect(source="127.0.0.2")))
            if number % 3 == 0:
                lines[-1].sendall(HEALTH)
            elif number % 3 == 1:
                lines[-1].sendall(HEALTH[:9])
            if number % 10 == 0:
                assert healthy(server) == 200
                assert healthy(server, "127.0.0.2") == 200
            if number >= 100:
                lines[number - 100].close()
        assert server.metric('crosstill_rejected_total{limit="idle"}') >= count - 100
        assert server.metric('crosstill_rejected_total{limit="connections"}') == 0


@pytest.mark.parametrize(
    "chunk",
    [
        pytest.param(b"1\r\na\r\n", id="bare"),
        pytest.param(b"1;" + b"x" * 4000 + b"\r\na\r\n", id="extended", marks=pytest.mark.slow),
    ],
)
def test_chunks_of_one_byte_stop_nobody(server, chunk):
    """Eight clients with 3 MB of such chunks each: 24 million would take h11 a minute."""
    pieces, before, rest = chunk * (60_000 // len(chunk)), server.cpu(), 0.0
    with ExitStack() as stack:
        lines = [stack.enter_context(server.connect()) for _ in range(8)]
        for line in lines:
            line.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(100):
            for line in lines:
                line.settimeout(0.01)
                with suppress(OSError):  # cut, or not read any more
                    line.send(pieces)
        assert healthy(server) == 200
        rest = server.cpu() - before
        for line in lines:
            said = last_words(line)
            assert said == b"" or said.startswith(b"HTTP/1.1 413 "), said
    assert rest < 2.0  # of a processor
    assert server.metric('crosstill_rejected_total{limit="small chunks"}') >= 8


def test_small_chunks_of_honest_clients_are_read(server, photo):
    """A photo in the lines of its file, as `requests` sends one, and another byte by byte."""
    whole = (photo + b"\0\n" * 1000)[: 20 * 1024]
    rows = [whole[at : at + 150] for at in range(0, len(whole), 150)]
    rows[-1:] = [bytes([byte]) for byte in rows[-1]] + [b"\n"] * 700
    body = b"".join(b"%x\r\n%b\r\n" % (len(row), row) for row in rows) + b"0\r\n\r\n"
    head = POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert server.raw(head + body).status == 200


@pytest.mark.parametrize("count", [1, 3])
def test_who_says_that_it_is_all_still_gets_the_answers(server, photo, count):
    """A client that shuts its side down behind its requests, as `nc -N` does."""
    head = POST + b"Content-Length: %d\r\n\r\n" % len(photo)
    with server.connect() as line:
        line.sendall((head + photo) * count)
        line.shutdown(socket.SHUT_WR)
        said = last_words(line)
    assert said is not None and said.count(b"HTTP/1.1 200 OK") == count
    with server.connect() as line:  # who stops within a request is cut without an answer
        line.sendall(head + photo[:100])
        line.shutdown(socket.SHUT_WR)
        assert last_words(line) == b""
