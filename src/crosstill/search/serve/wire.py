"""uvicorn's HTTP/1.1 protocol with time limits and a bound on what a request may cost.

uvicorn waits for ever for the head of a request, for a slow reader of its answer and for the end
of a body that no one reads; it cuts a line so suddenly that the answer on it can be lost, and one
whose other side has said all, though it still listens; and any number of connections may idle.

Other servers were attacked as uvicorn was (2026-11, one process, 2 cores) and leave more to do:

    granian 2.8 (hyper)    cuts slow heads; reads a body of two lengths, cuts no client that reads
                           nothing, drops who half-closes, and 1,100 idle connections shut it
    hypercorn 0.18         cuts slow heads, answers who half-closes; reads a body of two lengths,
                           cuts no client that reads nothing, and has no limit of connections
    uvicorn, httptools     reads 24 million chunks of one byte in 4 s, where h11 takes a minute,
                           and refuses two lengths; takes heads of any size and two Hosts, and
                           cuts neither slow heads nor who reads nothing
    a proxy such as nginx  does most of this, but `crosstill serve` must hold out alone

The subclass is of a private class: pyproject.toml pins uvicorn's versions.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from crosstill.search.serve.limits import CLOSE, Settings, refusal, secured
from crosstill.search.serve.load import Metrics

_READ = 256 * 1024  # bytes that asyncio reads in one go, and that may lie here unread


class Line:
    """A transport that closes in order: it sends what is left, then lets the other side read.

    It is cut `linger` seconds after all was sent, or when nothing of it was read for `stall`
    seconds. Cut at once, a line on which the other side still sends would lose the answer.

    Attributes:
        ended: the other side has said all; it may still listen.
        cut: the connection is gone.
    """

    def __init__(self, transport: asyncio.Transport, linger: float, stall: float) -> None:
        self._transport, self._linger, self._stall = transport, linger, stall
        self._written, self._closing, self._watched = 0, False, False
        self.ended = self.cut = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Tell whether nothing more will be written."""
        return self._closing or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Send data, unless the line is closing."""
        if not self.is_closing():
            self._written += len(data)
            self._transport.write(data)

    def close(self) -> None:
        """Send what is left and the end of the stream, and cut the line a little later."""
        if not self.is_closing():
            self._closing = True
            with suppress(OSError):  # the other side was faster
                self._transport.close() if self.ended else self._transport.write_eof()
            self.watch()

    def watch(self) -> None:
        """Begin to cut the line if nothing moves on it."""
        if not self._watched:
            self._watched = True
            self._look_later(self._written - self._transport.get_write_buffer_size(), 0.0)

    def _look_later(self, moved: int, still: float) -> None:
        asyncio.get_running_loop().call_later(self._linger, self._look, moved, still)

    def _look(self, before: int, still: float) -> None:
        """Compare with what had been sent at the last look; `still` is how long it is the same."""
        left = self._transport.get_write_buffer_size()
        moved = self._written - left
        still = still + self._linger if moved == before else 0.0
        self._watched = not self.cut and (self._closing or left > 0)
        if self._watched and still >= (self._stall if left else self._linger):
            self._transport.abort()
        elif self._watched:
            self._look_later(moved, still)


class Counted(h11.Connection):
    """h11's connection, which counts what a request costs beside its body.

    Each chunk is an event, whose handling takes longer than its byte; and a chunk may carry an
    extension, which is read and dropped.

    Attributes:
        costly: the request has come in too many chunks, or in too many bytes for its body.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(h11.SERVER, settings.head)
        self.settings, self.costly = settings, False
        self._received = self._body = self._chunks = 0  # of this request

    def receive_data(self, data: bytes) -> None:
        """Receive data."""
        self._received += len(data)
        super().receive_data(data)

    def next_event(self) -> Any:
        """Return the next event of the received data.

        Raises:
            h11.RemoteProtocolError: it is no HTTP, or `costly`.
        """
        event, settings = super().next_event(), self.settings
        if type(event) is h11.Request:
            self._received = self._body = self._chunks = 0
        elif type(event) is h11.Data:
            self._body += len(event.data)
            self._chunks += event.chunk_start
        spare = _READ + settings.head + 2 * self._body - self._received
        reading = self.their_state is h11.SEND_BODY  # else other requests may have come behind it
        if self._chunks > settings.chunks + self._body // settings.chunk or (reading and spare < 0):
            self.costly = True
            raise h11.RemoteProtocolError("too many chunks", error_status_hint=413)
        return event


class Room:
    """Places for connections; a newcomer takes the place of the one that has idled longest.

    A client address may have half of them, and takes its own where it has so many.
    """

    def __init__(self, most: int) -> None:
        self.most, self.most_each = most, max(1, most // 2)
        self._inside: Counter[str] = Counter()  # by address
        self._idle: dict[Protocol, None] = {}  # in the order in which they became so

    def enter(self, newcomer: Protocol) -> bool:
        """Take a place, to be left in any case; return whether there was one."""
        address = newcomer.address
        self._inside[address] += 1
        self.mark(newcomer, idle=True)
        own = self._inside[address] > self.most_each
        if not own and self._inside.total() <= self.most:
            return True
        for other in self._idle:
            if other is not newcomer and other.is_cheap() and (other.address == address or not own):
                del self._idle[other]
                newcomer.metrics.rejected.labels("idle").inc()
                other.line.abort()
                return True
        return False

    def leave(self, guest: Protocol) -> None:
        """Give the place back."""
        self._idle.pop(guest, None)
        self._inside[guest.address] -= 1
        if not self._inside[guest.address]:
            del self._inside[guest.address]

    def mark(self, guest: Protocol, idle: bool) -> None:
        """Note whether a connection waits for its next request."""
        if idle:
            self._idle.setdefault(guest)
        else:
            self._idle.pop(guest, None)


class Protocol(H11Protocol):
    """One connection; see `protocol`."""

    settings: Settings
    metrics: Metrics
    room: Room

    @property
    def address(self) -> str:
        """Return the client's address."""
        return self.client[0] if self.client else ""

    @property
    def idle(self) -> bool:
        """Tell whether no request is being answered; the head of one may be on its way."""
        cycle = self.cycle
        return cycle is None or cycle.response_complete or cycle.disconnected

    def is_cheap(self) -> bool:
        """Tell whether nothing is lost when the line is cut."""
        return self.line.get_write_buffer_size() == 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for the head of a request, where there is room for one more."""
        settings = self.settings
        self.line = Line(
            cast(asyncio.Transport, transport), settings.linger_seconds, settings.stall_seconds
        )
        self.waiting: asyncio.TimerHandle | None = None
        self.conn = self.counted = Counted(settings)
        super().connection_made(cast(asyncio.Transport, self.line))
        self.metrics.connections.inc()
        if not self.room.enter(self):
            self._refuse(503, "too many connections; try again soon", "connections")
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Release what the connection held."""
        self.line.cut = True
        self.metrics.connections.dec()
        self.room.leave(self)
        super().connection_lost(exc)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Receive data, but none any more once the answer closes the connection."""
        self.metrics.received.inc(len(data))
        if self.line.is_closing():
            self.line.pause_reading()
            return
        super().data_received(data)
        self._await_head()
        self.room.mark(self, self.idle)

    def on_response_complete(self) -> None:
        """Go on with data that came behind the request that is answered."""
        super().on_response_complete()
        self.room.mark(self, self.idle)
        if self.idle and self.line.ended:
            self.line.close()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the line while an answer is due; else asyncio closes it, once all is sent."""
        self.line.ended = not self.idle and self.conn.their_state is not h11.SEND_BODY
        self.line.watch()
        return self.line.ended

    def pause_writing(self) -> None:
        """Watch a client that reads slowly: it has to read at all."""
        super().pause_writing()
        self.line.watch()

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is no HTTP, or costs too much."""
        if self.counted.costly:
            self._refuse(413, "the body comes in too many small chunks", "small chunks")
            return
        self._refuse(400, "not an HTTP request that can be read", "malformed")

    def _await_head(self) -> None:
        """Have the clock run while the head of a request is due; more bytes do not stop it.

        Between two requests it is uvicorn's own clock that runs, until the first byte.
        """
        due = self.conn.their_state is h11.IDLE and not self.line.is_closing()
        if due and self.waiting is None:
            self.waiting = self.loop.call_later(self.settings.head_seconds, self._give_up)
        elif not due and self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None

    def _give_up(self) -> None:
        if self.conn.trailing_data[0]:
            self._refuse(408, "the head of the request did not arrive in time", "slow head")
        else:
            self.line.close()

    def _refuse(self, status: int, error: str, limit: str) -> None:
        """Answer without asking the application, and close."""
        self.metrics.rejected.labels(limit).inc()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = refusal(error)
            length = (b"content-length", b"%d" % len(body))
            headers = secured([(b"content-type", b"application/json"), length, CLOSE])
            if status == 503:
                headers.append((b"retry-after", b"%d" % self.settings.retry))
            answer = h11.Response(
                status_code=status, headers=headers, reason=STATUS_PHRASES[status]
            )
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.line.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.line.close()


def protocol(settings: Settings, metrics: Metrics) -> type[Protocol]:
    """Make the protocol class with these limits for uvicorn."""
    bound = {"settings": settings, "metrics": metrics, "room": Room(settings.connections)}
    return type("BoundProtocol", (Protocol,), bound)
