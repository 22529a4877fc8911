"""`crosstill serve`: an index as a search box, over HTTP and in a browser."""

from pathlib import Path
from typing import Annotated

import typer

from crosstill import extras
from crosstill.cli import common
from crosstill.errors import ConfigError

Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")]
AllowedHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allowed-host",
        metavar="NAME",
        help="Answer requests for this host too, as a proxy passes them on; may be repeated.",
    ),
]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.")]
Threads = Annotated[int, typer.Option(help="Of one pass through a tower.", min=1)]
Workers = Annotated[int, typer.Option(help="Threads that search, each several queries.", min=1)]
OtherBundle = Annotated[
    Path | None, typer.Option("--bundle", help="Use this bundle, not the index's own copy.")
]
Top = Annotated[int, typer.Option(help="Results of a request that does not say how many.", min=1)]
Threshold = Annotated[
    str | None,
    typer.Option(
        metavar="SCORE|auto",
        help="Least score of a result where a request names none; auto: the calibrated one.",
    ),
]
MaxBody = Annotated[int, typer.Option(help="MiB of a request's body.", min=1)]
Timeout = Annotated[
    float, typer.Option(help="Seconds from a request to its answer.", min=0.1, max=3600)
]
Queue = Annotated[int, typer.Option(help="Searches at once; the next is told to wait.", min=1)]


def command(
    index: Annotated[Path, typer.Argument(help="The folder that `crosstill index` made.")],
    host: Host = "127.0.0.1",
    port: Port = 8000,
    allowed_host: AllowedHost = None,
    threads: Threads = 1,
    workers: Workers = 1,
    bundle: OtherBundle = None,
    top: Top = 10,
    threshold: Threshold = None,
    max_body_mb: MaxBody = 20,
    timeout: Timeout = 10.0,
    queue: Queue = 256,
) -> None:
    """Serve INDEX over HTTP until Ctrl-C: a page at `/`, JSON at `/search`.

    New generations of the index are taken up by themselves.
    """
    try:
        from crosstill.search import MAX_TOP
        from crosstill.search.serve.limits import MIB, Settings, check_hosts
        from crosstill.search.serve.server import run
    except ImportError as error:
        raise extras.missing("the server", "search", str(error.name)) from None

    if top > MAX_TOP:
        raise ConfigError(f"--top {top}: give a number from 1 to {MAX_TOP}")
    settings = Settings(
        top=top,
        threshold=_threshold(threshold),
        body=max_body_mb * MIB,
        timeout=timeout,
        queue=queue,
        workers=workers,
        hosts=check_hosts(allowed_host or ()),
    )
    run(index, host, port, bundle, threads, settings, lambda at: common.say(f"listening on {at}"))


def _threshold(given: str | None) -> float | str | None:
    if given is None or given == "auto":
        return given
    try:
        if -1 <= float(given) <= 1:
            return float(given)
    except ValueError:
        pass
    raise ConfigError(f"--threshold {given}: give a score from -1 to 1, or auto")
