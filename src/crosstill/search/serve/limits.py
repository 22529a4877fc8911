"""All limits of the server, and the guard that applies them to every request and answer.

The guard counts bodies, times requests, checks the Host header and adds security headers.

A request has three spans: its body arrives, its answer is thought out, its answer is sent. The
first two have an end here; the third, as the request's head before it, in `wire`.
"""

import asyncio
import ipaddress
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crosstill.errors import ConfigError
from crosstill.search.serve.load import Gate, Metrics, Overloaded

# the page's own files, and a photo that was pasted into it; nothing from elsewhere
POLICY = (
    "default-src 'none'; img-src 'self' blob:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}

CLOSE = (b"connection", b"close")
REJECTED = {
    408: "slow body",
    413: "large body",
    431: "large head",
    421: "other host",
    503: "busy",
}  # by which limit

Pairs = list[tuple[bytes, bytes]]

MIB = 2**20
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,252}[a-z0-9_])?")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/?#@%\[\]]+)(:[0-9]*)?")
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


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


def secured(headers: Iterable[tuple[bytes, bytes]] = ()) -> Pairs:
    """Add the security headers that are not among these headers."""
    given = list(headers)
    names = {name.lower() for name, _ in given}
    return given + [
        (name.encode(), value.encode())
        for name, value in HEADERS.items()
        if name.encode() not in names
    ]


def refusal(error: str) -> bytes:
    """Return the body of an error."""
    return json.dumps({"error": error}).encode()


class Bodies(Gate):
    """Room for the bodies of all requests, in bytes; a client address may have half of it."""

    def __init__(self, most: int, largest: int) -> None:
        super().__init__(most)
        self.most_each = max(largest, most // 2)
        self._held: Counter[str] = Counter()  # by address

    def hold(self, amount: int, address: str) -> None:
        """Take room, which the caller releases.

        Raises:
            Overloaded: there is no room, or none for this address.
        """
        if self._held[address] + amount > self.most_each:
            raise Overloaded("too many large requests at once; try again soon")
        self.take(amount)
        self._held[address] += amount

    def release(self, amount: int, address: str) -> None:
        """Give the room back."""
        self.inside -= amount
        self._held[address] -= amount
        if not self._held[address]:
            del self._held[address]


class Guard:
    """The outermost application, which applies all limits to the one inside.

    A body that is too large ends in 413, one that is too slow in 408, both with a closed
    connection; an answer that takes too long in 503.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.bodies = Bodies(settings.bodies, settings.body)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # The connection itself leaves the body out of an answer to HEAD.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        await _Exchange(self, {**scope, "method": method}, receive, send).run()


class _Exchange:
    """One request and its answer."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.settings, self.metrics = guard, guard.settings, guard.metrics
        self.scope, self._receive, self._send = scope, receive, send
        self.headers = Headers(scope=scope)
        self.address = (scope.get("client") or ("",))[0]
        self.began, self.status = _now(), 0
        self.due = self.began + self.settings.body_seconds  # when more of the body has to be here
        self.size = 0  # of the body, so far
        self.whole = not {"content-length", "transfer-encoding"} & {*self.headers.keys()}

    async def run(self) -> None:
        try:
            await self._timed()
        finally:
            self.guard.bodies.release(self.size, self.address)
            # Under the route's pattern: what was asked for is the asker's.
            route = getattr(self.scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(self.status or 499)).inc()
            self.metrics.seconds.labels(route).observe(_now() - self.began)

    async def receive(self) -> Message:
        """Receive and count the next piece of the body; one announced as too large is not read.

        It is refused here and not with the head, so that a page can say so in its own way.
        """
        if int(self.headers.get("content-length", 0)) > self.settings.body:
            raise self._too_large()
        message = await self._receive()
        if message["type"] == "http.request":
            self._count(len(message.get("body", b"")))
            self.whole = self.whole or not message.get("more_body", False)
            self._wind()
        return message

    async def send(self, message: Message) -> None:
        """Send the next piece of the answer; nothing here limits how long that takes."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.status in REJECTED:
                self.metrics.rejected.labels(REJECTED[self.status]).inc()
            if not self.clock.expired():
                self.clock.reschedule(None)
            headers = secured(message.get("headers", ()))
            # The rest of the body will not be read: no other request can follow it.
            message = {**message, "headers": headers + ([] if self.whole else [CLOSE])}
        await self._send(message)

    async def _timed(self) -> None:
        self.clock = asyncio.timeout(None)
        try:
            async with self.clock:
                self._wind()
                try:
                    self._check_head()
                    await self.guard.app(self.scope, self.receive, self.send)
                except HTTPException as error:
                    if self.status:
                        raise
                    await self._refuse(error.status_code, error.detail)
                except asyncio.CancelledError:
                    if self.clock.expired():
                        raise
                    if not self.status:  # the server stops and cannot wait any longer
                        await self._refuse(503, "the server is stopping")
        except TimeoutError:
            if self.status or not self.clock.expired():
                raise
            if self.whole:
                await self._refuse(503, "this took too long; try again soon")
            else:
                await self._refuse(408, "the body of the request did not arrive in time")

    def _wind(self) -> None:
        """Set the deadline of the span that the request is in."""
        settings = self.settings
        if self.status:
            return
        if self.whole:
            self.clock.reschedule(_now() + settings.timeout)
        else:
            self.clock.reschedule(self.due)

    def _check_head(self) -> None:
        """Refuse requests that no route may answer."""
        host = host_of(self.headers.get("host", ""))
        if not host:
            raise HTTPException(400, "the Host header is missing or is no name")
        own = (self.scope.get("server") or ("",))[0]
        if not is_answered(host, own, self.settings.hosts):
            raise HTTPException(
                421, "this server has another name; --allowed-host NAME adds one to those it has"
            )
        # Two lengths of one body: a proxy that believes the other one sees other requests.
        if {"content-length", "transfer-encoding"} <= {*self.headers.keys()}:
            raise HTTPException(400, "give Content-Length or Transfer-Encoding, not both")
        size = sum(len(name) + len(value) for name, value in self.scope["headers"])
        size += len(self.scope.get("raw_path", b"")) + len(self.scope["query_string"])
        if size > self.settings.head:
            raise HTTPException(431, "the head of the request is too large")
        try:
            unquote_to_bytes(self.scope["query_string"]).decode()
        except UnicodeDecodeError:
            raise HTTPException(400, "the query is not UTF-8") from None

    def _count(self, amount: int) -> None:
        if self.size + amount > self.settings.body:
            raise self._too_large()
        self.guard.bodies.hold(amount, self.address)
        self.size += amount
        # What came fast earns no time for later: a body that stops is cut, however much is here.
        allowed = self.due + amount / self.settings.body_rate
        self.due = min(allowed, _now() + self.settings.body_seconds)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body is too large; at most {self.settings.body} bytes")

    async def _refuse(self, status: int, error: str) -> None:
        body = refusal(error)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if status == 503:
            headers.append((b"retry-after", b"%d" % self.settings.retry))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _now() -> float:
    return asyncio.get_running_loop().time()


def check_hosts(names: Iterable[str]) -> frozenset[str]:
    """Check names and addresses from the command line.

    Raises:
        ConfigError: one of them is neither, as with a port or a scheme.
    """
    hosts = frozenset(name.lower().strip("[]") for name in names)
    for name in hosts:
        if not _NAME.fullmatch(name) and _address(name) is None:
            raise ConfigError(
                f"--allowed-host {name}: give a name such as photos.example.org, or an address, "
                "without scheme and port"
            )
    return hosts


def host_of(header: str) -> str:
    """Parse a Host header to a host, lower case, without brackets and port; "" if it is none."""
    parts = _HOST.fullmatch(header.lower())
    return parts[1].strip("[]") if parts else ""


def is_answered(host: str, own: str, allowed: frozenset[str]) -> bool:
    """Tell whether the server answers for this host.

    A page elsewhere can let its own name lead to this machine (DNS rebinding): the browser then
    takes the server for a part of that page, which reads every photo. The name stays in the Host
    header. Starlette's TrustedHostMiddleware compares that with a fixed list, which can hold
    neither 127.0.0.0/8 nor the address that a connection came in at.

    Args:
        host: as `host_of` returns it.
        own: address at which the connection came in. No name can be made to look like it, so
            that it is safe also where the server listens on every address.
        allowed: other names and addresses.
    """
    if host == "localhost" or host in allowed:
        return True
    address = _address(host)
    return address is not None and (
        address.is_loopback or address == _address(own) or str(address) in allowed
    )


def _address(text: str) -> _Address | None:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
