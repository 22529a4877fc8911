"""All limits of the server."""

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """Limits and defaults of the server. Sizes are in bytes, times in seconds.

    Attributes:
        top: results of a search that does not say how many.
        threshold: least score of a result where the request names none; None sets no bound,
            "auto" is the index's calibrated one.
        text: characters of a query.
        timeout: from the last byte of a request to the first of its answer.
        queue: searches at once, the waiting ones included; the next is turned away.
        workers: threads that search, each with a batch of its own.
        batch: searches that one of them computes together.
        photo_encoders: threads that encode the photos of searches.
        retry: what a request that was turned away is told to wait.
        body: size of a request's body.
        bodies: size of all bodies that are held at once; a client address may have half of it.
        body_seconds, body_rate: a body must arrive within these seconds, and one more for
            every `body_rate` bytes that have come; it never has more than these seconds left.
        chunks, chunk: a body may come in so many chunks, and in one more for every `chunk` bytes.
        head: size of a request line and its headers.
        head_seconds: time in which they must arrive.
        idle_seconds: how long a connection may wait for its next request.
        stall_seconds: how long a client may read nothing of an answer.
        linger_seconds: how long a connection stays open, unused, behind its last answer.
        connections: open at once; a client address may have half of them.
        photo_workers: threads that read photos and make thumbnails.
        photo_queue: photos and thumbnails asked for at once.
        photo_size: a larger photo is not sent; its thumbnail is.
        photos: size of all photos that are being sent.
        thumbnail: longer side of a thumbnail, in pixels.
        thumbnails: size of all thumbnails kept in memory.
        hosts: names and addresses that the Host header may hold, beside loopback ones and the
            address that the connection came in at.
        refresh_seconds: how often to look for a newer generation of the index.
    """

    top: int = 10
    threshold: float | str | None = None
    text: int = 10_000
    timeout: float = 10.0
    queue: int = 256
    workers: int = 1
    batch: int = 32
    photo_encoders: int = 1
    retry: int = 1
    body: int = 20 * MIB
    bodies: int = 160 * MIB
    body_seconds: float = 10.0
    body_rate: int = 64 * 1024
    chunks: int = 1000
    chunk: int = 128
    head: int = 128 * 1024
    head_seconds: float = 10.0
    idle_seconds: int = 5
    stall_seconds: float = 8.0
    linger_seconds: float = 2.0
    connections: int = 1000
    photo_workers: int = 2
    photo_queue: int = 256
    photo_size: int = 64 * MIB
    photos: int = 256 * MIB
    thumbnail: int = 320
    thumbnails: int = 64 * MIB
    hosts: frozenset[str] = frozenset()
    refresh_seconds: float = 3.0
