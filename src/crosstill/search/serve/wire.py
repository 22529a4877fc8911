"""uvicorn's HTTP/1.1 with what it lacks: an end to its waiting.

uvicorn waits for ever for the head of a request, for a slow reader of its answer and for the end
of a body that no one reads; and it cuts a line so suddenly that the answer on it can be lost.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from crosstill.search.serve.limits import CLOSE, refusal, secured
from crosstill.search.serve.metrics import Metrics
from crosstill.search.serve.settings import Settings


class Line:
    """A transport that closes politely: it ends what it says, then lets the other side read.

    It is cut `linger` seconds after all was sent, or when nothing of it was read for `stall`
    seconds. Cut at once, a line on which the other side still sends would lose the answer.

    Attributes:
        cut: the connection is gone.
    """

    def __init__(self, transport: asyncio.Transport, linger: float, stall: float) -> None:
        self._transport, self._linger, self._stall = transport, linger, stall
        self._written, self._closing, self._watched = 0, False, False
        self.cut = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Nothing more will be written."""
        return self._closing or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        """Send this, unless the line is closing."""
        if not self.is_closing():
            self._written += len(data)
            self._transport.write(data)

    def close(self) -> None:
        """Send what is left, say that it is all, and cut the line a little later."""
        if not self.is_closing():
            self._closing = True
            with suppress(OSError):  # the other side was faster
                self._transport.write_eof()
            self.watch()

    def watch(self) -> None:
        """From now on, cut the line if nothing moves on it."""
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


class Protocol(H11Protocol):
    """One connection; see `protocol`."""

    settings: Settings
    metrics: Metrics

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for the head of a request, where there is room for one more."""
        settings = self.settings
        self.line = Line(
            cast(asyncio.Transport, transport), settings.linger_seconds, settings.stall_seconds
        )
        self.waiting: asyncio.TimerHandle | None = None
        super().connection_made(cast(asyncio.Transport, self.line))
        self.metrics.connections.inc()
        if len(self.connections) > settings.connections:
            self._refuse(503, "too many connections; try again soon", "connections")
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of what the connection held."""
        self.line.cut = True
        self.metrics.connections.dec()
        super().connection_lost(exc)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take what has come, but nothing any more once the answer is that we close."""
        self.metrics.received.inc(len(data))
        if self.line.is_closing():
            self.line.pause_reading()
            return
        super().data_received(data)
        self._await_head()

    def eof_received(self) -> None:
        """The transport is closed by asyncio now, which waits for a reader that may not read."""
        self.line.watch()

    def pause_writing(self) -> None:
        """The other side reads slowly; it has to read at all."""
        super().pause_writing()
        self.line.watch()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
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
    """The protocol with these limits, as uvicorn wants it: a class."""
    return type("BoundProtocol", (Protocol,), {"settings": settings, "metrics": metrics})
