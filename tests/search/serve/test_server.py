"""Starting, stopping, and following the index."""

import hashlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from contextlib import ExitStack

import pytest
from PIL import Image

from crosstill import files
from crosstill.errors import CorruptError
from crosstill.search import index_builder
from serving import free_port, last_words, serving
from support import PATIENCE, wait_for
from verbs import crosstill, refusal

LOCAL = "http://localhost"


def cost(server, words):
    """Seconds of a processor that a search takes."""
    before = server.cpu()
    server.search(q=words)
    return server.cpu() - before


def test_a_port_in_use_is_one_line_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal("serve", tmp_path / "no-index", "--port", port)
    assert line == (
        f"error: --port {port}: in use on 127.0.0.1; choose another, or 0 for any that is free"
    )


@pytest.mark.parametrize("host", ["no.such.host.invalid", "", "256.1.1.1", "192.0.2.1", "a b"])
def test_a_host_that_cannot_be_is_one_line(tmp_path, host):
    line = refusal("serve", tmp_path / "no-index", "--host", host, "--port", 0)
    assert line.startswith(f"error: --host {host}: ")


def test_two_servers_do_not_share_a_port(server, index_folder):
    line = refusal("serve", index_folder, "--port", server.port)
    assert f"--port {server.port}: in use" in line


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--port", 70000], "--port 70000"),
        (["--threshold", "high"], "--threshold high"),
        (["--threshold", "nan"], "--threshold nan"),
        (["--threshold", 2], "--threshold 2"),
        (["--top", 1001], "--top 1001"),
        (["--bundle", "nowhere", "--port", 0], "nowhere"),
    ],
)
def test_an_option_that_cannot_be_is_named(index_folder, options, named):
    assert named in refusal("serve", index_folder, *options)


def test_a_missing_library_is_named(index_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "crosstill.search.serve.server", None)
    assert "pip install 'crosstill[search]'" in refusal("serve", index_folder)


def test_a_folder_without_an_index_is_one_line(tmp_path):
    assert "no such index" in refusal("serve", tmp_path / "nothing", "--port", 0)
    assert "no index" in refusal("serve", tmp_path, "--port", 0)


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-1", "soon"])
def test_a_timeout_is_a_number_of_seconds(index_folder, value):
    assert "--timeout" in crosstill("serve", index_folder, "--timeout", value, code=2).stderr


def test_the_bundle_must_be_the_one_that_made_the_index(index_folder, bundle_folder, tmp_path):
    shutil.copytree(bundle_folder, tmp_path / "other")
    record = files.read_json(bundle_folder / "bundle.json")
    record["identity"]["weights"] = "another student's"
    files.write_json(tmp_path / "other" / "bundle.json", files.sealed(record))
    line = refusal("serve", index_folder, "--bundle", tmp_path / "other", "--port", 0)
    assert "not the same weights" in line


def test_a_damaged_index_is_named(index_folder, tmp_path):
    shutil.copytree(index_folder, tmp_path / "index")
    vectors = next((tmp_path / "index").glob("g-*/vectors.*"))
    vectors.write_bytes(vectors.read_bytes()[:-1])
    command = [sys.executable, "-m", "crosstill", "serve", tmp_path / "index", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert vectors.name in done.stderr


def test_sigterm_lets_requests_under_way_end_and_leaves_with_0(index_folder, tmp_path, photo):
    with serving(index_folder, tmp_path) as server, server.connect() as line:
        head = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        head += b"Content-Length: %d\r\n\r\n" % len(photo)
        line.sendall(head + photo[:100])
        wait_for(lambda: server.metric("crosstill_received_bytes_total") > len(head))
        server.process.terminate()
        server.wait_until_it_stops()
        line.sendall(photo[100:])
        assert line.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")
        assert server.process.wait(PATIENCE) == 0
        assert server.log() == ""


def test_sigterm_lets_a_photo_be_read_to_its_end(bundle_folder, tmp_path):
    """Fifteen megabytes, of which a client has read the first when the server is told to stop."""
    folder, index = tmp_path / "photos", tmp_path / "index"
    folder.mkdir()
    Image.new("RGB", (2250, 2250), "red").save(folder / "large.bmp")
    data = (folder / "large.bmp").read_bytes()
    index_builder.build(bundle_folder, folder, index)
    with serving(index, tmp_path) as server, server.connect() as line:
        address = f"/images/{hashlib.sha256(data).hexdigest()}"
        line.sendall(f"GET {address} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        read = line.recv(2**20)
        server.process.terminate()
        server.wait_until_it_stops()
        while piece := line.recv(2**20):
            read += piece
        assert read.partition(b"\r\n\r\n")[2] == data
        assert server.process.wait(PATIENCE) == 0 and server.log() == ""


def slow_bitmap(side):
    """A BMP of a few KiB whose empty lines Pillow fills byte by byte: 9,999 take half a minute."""
    rows = b"\x01\x00\x00\x00" * side + b"\x00\x01"
    size = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(rows), 0, 0, 256, 0)
    palette, start = bytes(4 * 256), 14 + 40 + 4 * 256
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + size + palette + rows


@pytest.mark.slow
def test_sigterm_does_not_wait_for_what_is_slow(index_folder, tmp_path):
    """Photos that take minutes to decode: their clients are told, and the process ends."""
    photo = slow_bitmap(9999)
    head = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/bmp\r\n"
    request = head + b"Content-Length: %d\r\n\r\n" % len(photo) + photo
    with serving(index_folder, tmp_path) as server, ExitStack() as stack:
        lines = [stack.enter_context(server.connect()) for _ in range(2)]
        for line in lines:
            line.sendall(request)
        wait_for(lambda: server.metric("crosstill_queue") == 2)
        server.process.terminate()
        for line in lines:
            assert last_words(line).startswith((b"HTTP/1.1 503 ", b"HTTP/1.1 400 "))
        assert server.process.wait(PATIENCE) == 0
        assert "Traceback" not in server.log()


def test_ctrl_c_leaves_with_130(index_folder, tmp_path):
    with serving(index_folder, tmp_path) as server, server.connect() as kept:
        kept.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert kept.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE) == 130
        assert server.log() == "interrupted\n"


def test_ctrl_c_twice_leaves_at_once_and_says_one_line(index_folder, tmp_path):
    """Under an upload that does not end, for which the first one waits."""
    with serving(index_folder, tmp_path) as server, server.connect() as line:
        line.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n")
        line.sendall(b"Content-Length: 1000\r\n\r\nbegun")
        wait_for(lambda: server.metric("crosstill_connections") == 2)
        server.process.send_signal(signal.SIGINT)
        server.wait_until_it_stops()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE) == 130
        assert server.log() == "interrupted\n"


def test_it_is_ready_when_both_towers_are_warm_and_warns_when_all_may_come(index_folder, tmp_path):
    """Alive and not ready first; once it is ready, the first answer costs no more than others."""
    port, seen = free_port(), []
    with serving(index_folder, tmp_path, "--host", "0.0.0.0", port=port) as server:
        wait_for(server.listens)
        while not seen or seen[-1] != 200:
            seen.append(server.ask("/readyz").status)
        first, *usual = (cost(server, f"number {number}") for number in range(31))
        assert set(seen) <= {200, 503}
        assert first <= 2 * max(usual) + 0.02
        line = server.process.stdout.readline().decode()
        assert line == f"listening on http://0.0.0.0:{port}/\n"
        assert "whoever reaches this machine" in server.log()


def test_on_loopback_nothing_is_said(server):
    assert server.log() == ""


def test_searches_before_it_is_ready_are_told_to_wait(searcher, monkeypatch):
    """In this process, where warming can be held up."""
    from starlette.testclient import TestClient

    from crosstill.search.serve.limits import Settings
    from crosstill.search.serve.routes import create

    app = create(searcher, Settings())
    with TestClient(app, LOCAL) as client:
        for target in ("/readyz", "/search?q=a", "/search?like=" + "0" * 64):
            found = client.get(target)
            assert found.status_code == 503 and found.headers["retry-after"] == "1", target
            assert "loaded" in found.json()["error"]
        assert client.get("/healthz").status_code == 200
        app.service.ready = True
        assert client.get("/readyz").status_code == 200
        assert client.get("/search?q=a").status_code == 200


class Panic(BaseException):
    """As what tokenizers' Rust raises."""


@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("encode_texts", Panic("in /home/secret"), "a worker failed: Panic"),
        ("find", RuntimeError("in /home/secret"), "RuntimeError; the server's log says more"),
        ("find", CorruptError("{index}/g-1/photos.sqlite: malformed"), "INDEX/g-1/photos.sqlite"),
    ],
)
def test_it_is_not_ready_while_searches_fail(searcher, monkeypatch, name, error, reason):
    """Until they succeed again, with the same workers."""
    from starlette.testclient import TestClient

    from crosstill.search.serve.limits import Settings
    from crosstill.search.serve.routes import create

    if isinstance(error, CorruptError):
        error = CorruptError(str(error).format(index=searcher.index))

    def broken(*given):
        raise error

    app = create(searcher, Settings())
    app.service.ready = True
    with TestClient(app, LOCAL, raise_server_exceptions=False) as client:
        assert client.get("/readyz").status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(searcher, name, broken)
            for _ in range(3):
                damaged = isinstance(error, CorruptError)
                assert client.get("/search?q=a").status_code == (503 if damaged else 500)
                found = client.get("/readyz")
                assert found.status_code == 503 and found.headers["retry-after"] == "1"
                assert reason in found.json()["error"] and "secret" not in found.text
            assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 200
        assert client.get("/search?q=a").status_code == 200


@pytest.mark.slow
def test_a_catalogue_that_goes_bad_is_named_until_the_index_is_made_again(
    bundle_folder, photos, tmp_path
):
    folder, index = tmp_path / "photos", tmp_path / "index"
    shutil.copytree(photos, folder)
    for photo in list(folder.rglob("*.png")):  # captions of 3 MB: SQLite keeps two in memory
        other = photo.with_stem(f"{photo.stem}-other")
        other.write_bytes(photo.read_bytes() + b"\0")
        for named in (photo, other):
            named.with_suffix(".txt").write_text("🐕" * 10_000, encoding="utf-8")
    index_builder.build(bundle_folder, folder, index)
    with serving(index, tmp_path) as server:
        assert server.ask("/readyz").status == 200
        catalogue = next(index.glob("g-*/photos.sqlite"))
        with catalogue.open("r+b") as file:  # in place: the server has it open
            file.write(b"\0" * catalogue.stat().st_size)
        found = server.ask("/readyz")
        assert found.status == 503 and catalogue.name in found.json["error"], found
        assert "crosstill index" in found.json["error"] and str(tmp_path) not in str(found.json)
        index_builder.build(bundle_folder, folder, index)
        wait_for(lambda: server.ask("/readyz").status == 200)
        assert server.search(q="a circle")["results"]
        assert "not ready: " in server.log()


def test_a_catalogue_that_is_emptied_costs_no_traceback(bundle_folder, photos, tmp_path):
    index = tmp_path / "index"
    index_builder.build(bundle_folder, photos, index)
    with serving(index, tmp_path) as server:
        photo_id = server.search(q="a circle")["results"][0]["id"]
        catalogue = next(index.glob("g-*/photos.sqlite"))
        catalogue.open("wb").close()  # in place: the server has it open
        for target in [f"/images/{photo_id}", f"/thumbnails/{photo_id}", "/search?q=a"] * 2:
            found = server.ask(target)
            assert found.status == 503 and found.headers["retry-after"] == "1", found
            assert catalogue.name in found.json["error"] and str(tmp_path) not in str(found.json)
        assert len(server.log().splitlines()) == 1 and catalogue.name in server.log()
        found = server.ask("/readyz")
        assert found.status == 503 and catalogue.name in found.json["error"]


def test_an_error_of_ours_tells_the_asker_nothing(searcher, monkeypatch):
    from starlette.testclient import TestClient

    from crosstill.search.serve.limits import Settings
    from crosstill.search.serve.routes import create

    def broken(texts):
        raise RuntimeError("/home/secret/model.onnx is broken")

    monkeypatch.setattr(searcher, "encode_texts", broken, raising=False)
    app = create(searcher, Settings())
    app.service.ready = True
    with TestClient(app, LOCAL, raise_server_exceptions=False) as client:
        found = client.get("/search?q=a")
        assert found.status_code == 500
        assert found.json() == {"error": "something went wrong here; the server's log says what"}
        assert found.headers["x-content-type-options"] == "nosniff"


def test_a_new_generation_is_taken_up(bundle_folder, photos, tmp_path):
    folder, index = tmp_path / "photos", tmp_path / "index"
    shutil.copytree(photos, folder)
    held = min(path for path in folder.rglob("*") if path.suffix == ".png")
    aside = tmp_path / held.name
    held.rename(aside)
    index_builder.build(bundle_folder, folder, index)
    with serving(index, tmp_path) as server:
        first = server.search(q="a circle", top=100)
        assert len(first["results"]) == 39
        shutil.copy(aside, held)
        index_builder.build(bundle_folder, folder, index)
        wait_for(lambda: server.search(q="a")["generation"] > first["generation"])
        assert len(server.search(q="a circle", top=100)["results"]) == 40
        assert server.metric("crosstill_index_photos") == 40
        shutil.rmtree(index)
        wait_for(lambda: "still serving generation" in server.log())
        assert len(server.search(q="a circle", top=100)["results"]) == 40


def test_no_torch_is_loaded(index_folder):
    """In a fresh interpreter: everything that `serve` needs, and a search."""
    code = """
import sys
from pathlib import Path
from crosstill.cli import serve
from crosstill.search.searcher import Searcher
from crosstill.search.serve import server
searcher = Searcher.open(Path(sys.argv[1]))
server.create(searcher, server.Settings())
searcher.warm()
heavy = {"torch", "transformers", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, index_folder], check=True, env=environment)
