"""Libraries that only some verbs need, which come with the extras of the package.

A verb asks for all that it is going to need before it begins to work, so that nobody waits for a
result that cannot be written.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from crosstill.errors import ConfigError


def need(what: str, extra: str, *modules: str) -> None:
    """Refuse to begin something whose libraries are not all installed.

    Args:
        what: begins, for the message: "a report".
        extra: which has the libraries.
        modules: as they are imported.

    Raises:
        ConfigError: one is missing; the message says how to install it.
    """
    lacking = [name for name in modules if find_spec(name) is None]
    if lacking:
        raise missing(what, extra, *lacking)


def load(what: str, extra: str, module: str) -> Any:
    """Import a library of an extra, or refuse as `need` does."""
    need(what, extra, module)
    return import_module(module)


def missing(what: str, extra: str, *modules: str) -> ConfigError:
    """Make the error of libraries that are not there."""
    them = "it" if len(modules) == 1 else "them"
    return ConfigError(
        f"{what} needs {' and '.join(modules)}; "
        f"install {them} with: pip install 'crosstill[{extra}]'"
    )
