"""One page that shows what a run, or a grid of runs, came to, and the tables beside it.

report.html    self-contained: pictures inside, no script, no request
table.md       the same tables for a README
table.tex      and for a paper (booktabs)
report.json    the figures of a run, or metrics.json those of a grid
"""

from pathlib import Path

from crosstill import extras, files
from crosstill.errors import InputError

__all__ = ["write"]

NEEDS = ("matplotlib", "sklearn", "jinja2")


def write(source: str | Path, out: str | Path | None = None, *, latency: bool = True) -> Path:
    """Write the report of a finished run or grid.

    Args:
        source: the folder of a run or of a grid.
        out: where to write; None is that folder itself.
        latency: time teacher and student on one thread; for runs only.

    Returns:
        The path of report.html.

    Raises:
        InputError: the folder is neither, or not finished, or the run's cache or a photo is gone.
        MismatchError: the cache or a photo is not the one that the run learnt from.
        ConfigError: the extra `report` is not installed.
    """
    check(source, out)
    from crosstill import ablate
    from crosstill.report import pages

    folder = Path(source)
    target = Path(out) if out is not None else folder
    if pages.is_run(folder):
        return pages.write_run(folder, target, latency)
    if ablate.is_grid(folder):
        return pages.write_grid(folder, target)
    raise InputError(
        f"{folder}: neither a run nor a grid; give a folder that `crosstill train` or "
        "`crosstill ablate` made"
    )


def check(source: str | Path, out: str | Path | None) -> None:
    """Refuse what can be refused before libraries are loaded, which takes seconds.

    Raises:
        InputError: no folder `source`, or no place to write to.
        ConfigError: the extra `report` is not installed.
    """
    extras.need("a report", "report", *NEEDS)
    if not Path(source).is_dir():
        raise InputError(f"{source}: no such folder")
    files.check_writable(Path(source if out is None else out))
