"""`crosstill serve`: open an index and serve it over HTTP."""

import asyncio
import errno
import ipaddress
import logging
import resource
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

import uvicorn

from crosstill.errors import ConfigError
from crosstill.search.searcher import Searcher
from crosstill.search.serve.limits import Settings
from crosstill.search.serve.load import jobs
from crosstill.search.serve.routes import App, create
from crosstill.search.serve.service import AUTO
from crosstill.search.serve.wire import protocol

log = logging.getLogger(__name__)

_SPARE = 100  # files open beside the connections
_GRACE = 10  # seconds that requests under way have once the server was told to stop


def run(
    index: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    bundle: Path | None = None,
    threads: int = 1,
    settings: Settings | None = None,
    tell: Callable[[str], object] = log.info,
) -> None:
    """Serve an index until SIGTERM, which ends it with exit code 0, or SIGINT.

    Args:
        index: the folder that `crosstill index` made.
        host: name or address to listen on.
        port: 0 picks a free one.
        bundle: use this one in place of the index's own copy.
        threads: that one pass of a tower may use.
        settings: every limit.
        tell: is told the address once both towers are warm.

    Raises:
        ConfigError: the host is not one of this machine's, or the port is in use.
        CrosstillError: the index or the bundle does not open.
        KeyboardInterrupt: SIGINT.
    """
    settings = settings or Settings()
    settings = replace(settings, hosts=settings.hosts | {host.lower()})
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a bad form is no news
    signal.signal(signal.SIGTERM, _leave)
    with listen(host, port) as listener:
        searcher = Searcher.open(index, bundle, threads)
        try:
            if settings.threshold == AUTO:
                searcher.check_calibrated()
            _warn(listener)
            app = create(searcher, _affordable(settings))
            asyncio.run(_serve(app, listener, lambda: tell(address(listener))))
        finally:
            searcher.close()


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket, before anything else is done.

    Raises:
        ConfigError: one line that names the option.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: give a number from 0 to 65535")
    try:
        if not host:  # which would be every address
            raise OSError
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise ConfigError(f"--host {host}: no such address; the default is 127.0.0.1") from None
    family, kind, number, _, where = addresses[0]
    listener = socket.socket(family, kind, number)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise _unusable(host, port, error) from None
    return listener


def address(listener: socket.socket) -> str:
    """Return the address of the page."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


class _Server(uvicorn.Server):
    """uvicorn without tracebacks of requests that a second Ctrl-C cuts."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop in good order at the first signal, at once at a second one that is SIGINT."""
        if self.should_exit and sig == signal.SIGINT:
            logging.disable()  # each request and each task would tell a traceback
            self.force_exit = True
        else:
            super().handle_exit(sig, frame)


async def _serve(app: App, listener: socket.socket, ready: Callable[[], object]) -> None:
    """Listen at once, be ready when both towers are warm, follow the index until told to stop."""
    settings = app.service.settings
    config = uvicorn.Config(
        app,
        http=protocol(settings, app.metrics),
        ws="none",
        loop="asyncio",
        interface="asgi3",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=settings.head,
        timeout_keep_alive=settings.idle_seconds,
        timeout_graceful_shutdown=_GRACE,
    )
    server = _Server(config)
    beside = asyncio.create_task(_follow(app, ready))
    beside.add_done_callback(lambda _: setattr(server, "should_exit", True))
    try:
        await server.serve([listener])
    finally:
        beside.cancel()
    if beside.done() and not beside.cancelled():
        beside.result()  # it ended first: the models did not run


async def _follow(app: App, ready: Callable[[], object]) -> None:
    searcher, settings, beside = app.service.searcher, app.service.settings, jobs(1)
    await beside(searcher.warm)
    app.service.ready = True
    ready()
    while True:
        await asyncio.sleep(settings.refresh_seconds)
        if await beside(searcher.refresh):
            log.info("generation %d: %d photos", searcher.generation, len(searcher))


def _affordable(settings: Settings) -> Settings:
    """Limit the connections to the open files that the system allows one process."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.connections + _SPARE
    files = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    return replace(settings, connections=max(1, files - _SPARE))


def _warn(listener: socket.socket) -> None:
    host = listener.getsockname()[0]
    if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        log.warning(
            "listening on %s: whoever reaches this machine can search and see the photos; "
            "put a proxy with TLS and a login before it. Asked for by another name than this "
            "machine's addresses, it refuses: see --allowed-host",
            host,
        )


def _unusable(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"--port {port}: in use on {host}; choose another, or 0 for any that is free"
        )
    if error.errno == errno.EACCES:
        return ConfigError(f"--port {port}: not allowed to this user; choose one from 1024 on")
    return ConfigError(f"--host {host}: cannot be listened on here ({error.strerror})")


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)
