"""`crosstill serve` as its users run it, and a client that can also misbehave."""

import http.client
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import PATIENCE, wait_for

COMMAND = [sys.executable, "-m", "crosstill", "serve"]


@dataclass(frozen=True)
class Reply:
    """What came back; headers have lower-case names."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """The command that ships, in a process of its own."""

    def __init__(self, process: subprocess.Popen, port: int, errors: Path) -> None:
        self.process, self.port, self._errors = process, port, errors

    def log(self) -> str:
        return self._errors.read_text()

    def connect(self, timeout: float = PATIENCE, source: str = "") -> socket.socket:
        """A connection, from another loopback address where `source` names one."""
        here = (source, 0) if source else None
        return socket.create_connection(("127.0.0.1", self.port), timeout, here)

    def ask(self, target: str, method: str = "GET", body: bytes = b"", **headers: str) -> Reply:
        """One well-formed request; `content_type=...` becomes a header's name."""
        lines = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        return self.raw("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def raw(self, request: bytes, timeout: float = PATIENCE) -> Reply:
        """Whatever these bytes are, sent while the answer is awaited; read to its end."""
        with self.connect(timeout) as line:
            sender = threading.Thread(target=_send, args=(line, request))
            sender.start()
            found = reply(line)
            line.close()
            sender.join()
            return found

    def search(self, **query: Any) -> Any:
        """The JSON of a search that must succeed."""
        from urllib.parse import urlencode

        found = self.ask("/search?" + urlencode(query))
        assert found.status == 200, found
        return found.json

    def metric(self, name: str) -> float:
        """The value of a line of /metrics, by its name and labels; 0 where it is not there."""
        text = self.ask("/metrics").body.decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def cpu(self) -> float:
        """Seconds of a processor that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait_until_it_stops(self) -> None:
        """Wait until it has been told to stop, and so listens no more."""
        wait_for(lambda: not self.listens())

    def listens(self) -> bool:
        """Whether it takes connections."""
        try:
            self.connect().close()
        except ConnectionError:
            return False
        return True

    def memory(self) -> int:
        """Resident bytes."""
        return _status(self.process.pid, "VmRSS")

    def peak(self) -> int:
        """Resident bytes at most, so far."""
        return _status(self.process.pid, "VmHWM")


@contextmanager
def serving(
    index: Path, folder: Path, *options: object, port: int = 0, files: int = 0, **environment: str
) -> Iterator[Server]:
    """The server, until the block ends.

    Args:
        index: what to serve.
        folder: for its stderr.
        options: of the command.
        port: to listen on; with 0 it picks one, and the block begins when it is ready.
        files: how many the system lets it have open; 0 for as many as this process may.
        environment: variables of the process.
    """
    errors = folder / f"serve-{time.monotonic_ns()}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [*COMMAND, str(index), "--port", str(port), *map(str, options)]
    if files:
        command = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *command]
    with errors.open("wb") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, env=environment)
    try:
        yield Server(process, port or _told(process, errors), errors)
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        finally:
            process.kill()
            process.stdout.close()


@contextmanager
def proxied(server: Server, prefix: str = "/photos") -> Iterator[str]:
    """A small proxy that serves the server under a path; its address, which ends in that path."""

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith(prefix + "/"):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            with closing(
                http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
            ) as line:
                kind = {"Content-Type": self.headers["content-type"]} if body else {}
                line.request(self.command, self.path[len(prefix) :], body or None, kind)
                answer = line.getresponse()
                data = answer.read()
            with suppress(ConnectionError):  # a browser that leaves a page waits for no picture
                self.send_response(answer.status)
                for name in ("Content-Type", "Content-Security-Policy"):
                    self.send_header(name, answer.headers.get(name, ""))
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *told: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{proxy.server_port}{prefix}/"
        finally:
            proxy.shutdown()


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def reply(line: socket.socket) -> Reply:
    """Read one answer to its end."""
    file = line.makefile("rb")
    status = int(file.readline().split()[1])
    headers = {}
    for row in iter(file.readline, b"\r\n"):
        name, _, value = row.decode().partition(":")
        headers[name.lower()] = value.strip()
    length = headers.get("content-length")
    return Reply(status, headers, file.read(int(length)) if length else file.read())


def form(data: bytes, name: str = "image", kind: str = "image/png", **fields: str) -> dict:
    """Body and type of a form with a photo, for `Server.ask`."""
    edge = "edge-of-a-part"
    parts = [
        f'--{edge}\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{v}\r\n'.encode()
        for n, v in fields.items()
    ]
    head = f'--{edge}\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n'
    parts += [f"{head}Content-Type: {kind}\r\n\r\n".encode(), data, f"\r\n--{edge}--\r\n".encode()]
    return {"body": b"".join(parts), "content_type": f"multipart/form-data; boundary={edge}"}


def last_words(line: socket.socket, within: float = PATIENCE) -> bytes | None:
    """What the other side still says before it closes; None where it does not close in time."""
    said, until = b"", time.monotonic() + within
    while (left := until - time.monotonic()) > 0:
        line.settimeout(left)
        try:
            piece = line.recv(65536)
        except TimeoutError:
            return None
        except OSError:
            return said
        if not piece:
            return said
        said += piece
    return None


def _told(process: subprocess.Popen, errors: Path) -> int:
    line = process.stdout.readline().decode()
    found = re.fullmatch(r"listening on http://127\.0\.0\.1:(\d+)/\n", line)
    assert found, (line, errors.read_text())
    return int(found[1])


def _send(line: socket.socket, request: bytes) -> None:
    with suppress(OSError):  # it was cut, as it should be
        line.sendall(request)


def _status(process: int, name: str) -> int:
    rows = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * int(next(row for row in rows if row.startswith(name)).split()[1])
