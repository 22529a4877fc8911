"""`crosstill serve` with many vectors: what HTTP adds to a query, many clients, and memory.

The command that ships, on one thread, in a process of its own. A text query over HTTP takes turns
with the encoder alone and with bare FAISS on the same vectors; then 16 clients ask at once; then
one client asks thousands of times. Vectors and model are made up, or those of a real index, whose
vectors are repeated with a little noise until there are enough.

    python -m benchmarks.serving [--index INDEX] [--count 100000] [--requests 20000]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from statistics import median, quantiles
from urllib.parse import urlencode, urlsplit

import faiss
import numpy as np

from benchmarks import models
from benchmarks.vectors import repeated, unit
from crosstill import data, export, students
from crosstill.bundle import Bundle, Encoder
from crosstill.data.scenes import write
from crosstill.search import catalogue, index_builder, index_folder
from crosstill.search.catalogue import Row
from crosstill.search.memory_vectors import MemoryVectors
from crosstill.search.vector_index import kind_for
from crosstill.students.student_config import StudentConfig

QUERIES, CLIENTS, TOP = 200, 16, 10
SMALL = "--count", "20000", "--requests", "2000"  # for `make bench`
KEPT = 3.0  # seconds that a connection without requests is good for
WORDS = "two dogs run on snow while a man in red watches from the old bridge"


def main(arguments: Sequence[str] = SMALL) -> dict[str, float]:
    """Measure, print a table and a line, and return the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    parser.add_argument("--index", type=Path, help="a real one, in place of one that is made up")
    parser.add_argument("--count", type=int, default=100_000, help="vectors")
    parser.add_argument("--requests", type=int, default=20_000, help="for the memory")
    options = parser.parse_args(arguments)
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory() as beside:
        place = Path(beside)
        bundle, vectors = _prepare(place, options.index, options.count)
        with _serving(place / "index") as server:
            found = _latency(server, Encoder(bundle), vectors)
            found |= _throughput(server)
            found |= _memory(server, options.requests)
    return _report(found, len(vectors))


class Server:
    """The process, and one kept connection to it for each thread.

    Its client is as lean as can be: what `http.client` takes to read an answer is not the server's.
    """

    def __init__(self, process: int, address: str) -> None:
        self.process, self._port = process, urlsplit(address).port
        self._lines = threading.local()

    def search(self, words: str) -> None:
        """One query; it must be answered."""
        if time.monotonic() - getattr(self._lines, "used", 0) > KEPT:
            self._lines.line = socket.create_connection(("127.0.0.1", self._port), 60)
        self._lines.used = time.monotonic()
        query = urlencode({"q": words, "top": TOP})
        self._lines.line.sendall(
            f"GET /search?{query} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
        )
        answer = self._lines.line.recv(65536)
        while len(answer) < _length(answer):
            answer += self._lines.line.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 "), answer

    def memory(self) -> int:
        """Resident bytes."""
        rows = Path(f"/proc/{self.process}/status").read_text().splitlines()
        return 1024 * int(next(row for row in rows if row.startswith("VmRSS")).split()[1])


def _length(answer: bytes) -> float:
    """How long an answer will be, body included, as far as its beginning tells."""
    head, found, _ = answer.partition(b"\r\n\r\n")
    size = re.search(rb"content-length: (\d+)", head)
    return len(head + found) + int(size[1]) if found and size else inf


def caption(number: int) -> str:
    """One of many captions of 6 to 12 words."""
    random = np.random.default_rng(number)
    return " ".join(random.choice(WORDS.split(), random.integers(6, 13)))


def _prepare(place: Path, real: Path | None, count: int) -> tuple[Bundle, np.ndarray]:
    """An index of so many vectors at `place`/index, whose photos are no more than names."""
    if real is None:
        real = _small_index(place)
    base = index_folder.read_pointer(real)
    held = index_folder.open_vectors(real, base)
    vectors = repeated(unit(held.vectors(held.ids())), count)
    bundle = Bundle.open(real / base.bundle)
    index, number = place / "index", 1
    index.mkdir()
    with index_folder.written_aside(index_folder.generation_folder(index, number)) as aside:
        shas = (hashlib.sha256(str(i).encode()).digest() for i in range(count))
        rows = {f"{i:07}.jpg": Row(sha, 1, 1, caption(i % 5000)) for i, sha in enumerate(shas)}
        change = catalogue.write(aside / catalogue.NAME, None, rows)
        stored = MemoryVectors(bundle.dim, kind_for(count))
        stored.add(np.array([photo for photo, _ in change.added]), vectors)
        stored.save(aside)
        digests = index_folder.digest_files(aside)
    index_folder.switch(
        index,
        index_folder.Pointer(
            generation=number,
            previous=None,
            identity=bundle.identity,
            bundle=index_folder.copy_bundle(index, bundle),
            dim=bundle.dim,
            kind=kind_for(count),
            folder=str(place),
            photos=count,
            files=digests,
        ),
    )
    return bundle, vectors


def _small_index(place: Path) -> Path:
    """The index of 500 scenes by a student that was not trained."""
    write(place / "photos", 500, seed=0).unlink()
    captions = [text for e in data.open("scenes:50").examples for text in e.captions]
    student = students.build(StudentConfig.model_validate(models.STUDENT), 512, captions)
    bundle = export.onnx(student, place / "bundle").folder
    index_builder.build(bundle, place / "photos", place / "small")
    return place / "small"


@contextmanager
def _serving(index: Path) -> Iterator[Server]:
    command = [sys.executable, "-m", "crosstill", "serve", str(index), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout
            yield Server(process.pid, process.stdout.readline().split()[-1])
        finally:
            process.terminate()


def _latency(server: Server, encoder: Encoder, vectors: np.ndarray) -> dict[str, float]:
    """Median seconds of a query over HTTP and of its two parts, which take turns."""
    bare = faiss.IndexFlatIP(vectors.shape[1])
    bare.add(vectors)
    times: dict[str, list[float]] = {"http": [], "encode": [], "faiss": []}
    for number in range(QUERIES + 20):
        words = caption(number)
        times["http"].append(_seconds(server.search, words))
        times["encode"].append(_seconds(encoder.encode_texts, [words]))
        vector = encoder.encode_texts([words])
        times["faiss"].append(_seconds(bare.search, vector, TOP))
    found = {name: median(seconds[20:]) for name, seconds in times.items()}
    return {**found, "ratio": found["http"] / (found["encode"] + found["faiss"])}


def _throughput(server: Server) -> dict[str, float]:
    """16 clients, each of which asks again as soon as it is answered."""
    seconds: list[float] = []

    def ask(client: int) -> None:
        for number in range(QUERIES // 4):
            words = caption(1000 * client + number)
            seconds.append(_seconds(server.search, words))

    clients = [threading.Thread(target=ask, args=(client,)) for client in range(CLIENTS)]
    began = time.perf_counter()
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    rate = len(seconds) / (time.perf_counter() - began)
    return {"rate": rate, "p50 of 16": median(seconds), "p95 of 16": quantiles(seconds, n=20)[-1]}


def _memory(server: Server, requests: int) -> dict[str, float]:
    """Resident bytes after a tenth of the requests, and what the others added."""
    first = requests // 10
    for number in range(first):
        server.search(caption(number))
    before = server.memory()
    for number in range(first, requests):
        server.search(caption(number))
    return {"memory": before, "growth": (server.memory() - before) / (requests - first)}


def _seconds(work: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def _report(found: dict[str, float], count: int) -> dict[str, float]:
    ms = {name: f"{1000 * value:.2f} ms" for name, value in found.items()}
    print(f"  {count:,} vectors, {kind_for(count)}, one thread")
    print(f"  p50 of a query over HTTP  {ms['http']}")
    print(f"  encoder alone             {ms['encode']}")
    print(f"  bare FAISS, flat          {ms['faiss']}")
    print(
        f"  {CLIENTS} clients                {found['rate']:.0f} queries a second, "
        f"p50 {ms['p50 of 16']}, p95 {ms['p95 of 16']}"
    )
    print(
        f"  memory                    {found['memory'] / 1e6:.0f} MB, "
        f"growing by {found['growth']:.0f} bytes a request"
    )
    print(
        f"{'serving':8} {found['ratio']:.3f}  (HTTP over encoder + bare FAISS, "
        "wanted at most 0.75 with 100,000 vectors)",
        flush=True,
    )
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
