"""Finding a class by its file's name, and refusing options that it cannot have."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from crosstill.errors import ConfigError, did_you_mean, unknown


def names(package: str) -> list[str]:
    """The plug-ins of a package: its files but for `base`; folders hold what they share."""
    found = pkgutil.iter_modules(import_module(package).__path__)
    return sorted(m.name for m in found if not m.ispkg and m.name != "base")


def find(package: str, kind: str, name: str) -> ModuleType:
    """Import the plug-in of that name, or say which names exist."""
    if name not in names(package):
        raise unknown(kind, name, names(package))
    return import_module(f"{package}.{name}")


def options(plugin: type) -> dict[str, inspect.Parameter]:
    """The named arguments of a class, in their order."""
    anything = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(plugin, eval_str=True).parameters
    return {k: v for k, v in parameters.items() if v.kind not in anything}


def construct(
    plugin: type, what: str, given: Mapping[str, object], chosen: Mapping[str, object]
) -> Any:
    """Call a class with what its package gives and what the user chose.

    Args:
        plugin: the class.
        what: how an error names it, such as "loss 'contrastive'".
        given: arguments that the program supplies; they are no options.
        chosen: the user's options; each is checked against the class's own signature.

    Raises:
        ConfigError: an option is unknown, missing, of the wrong type or out of range.
    """
    allowed = {k: v for k, v in options(plugin).items() if k not in given}
    for option, value in chosen.items():
        if option not in allowed:
            raise ConfigError(f"{what} has no option {option!r}{_hint(option, allowed)}")
        _check_type(what, allowed[option], value)
    for option, parameter in allowed.items():
        if option not in chosen and parameter.default is parameter.empty:
            raise ConfigError(f"{what} needs the option {option!r}; set it")
    try:
        return plugin(**given, **chosen)
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None


def positive(**values: float) -> None:
    """Refuse an option that is not a finite number above zero."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name} must be above 0, not {value}; give a positive number")


def _hint(option: str, allowed: Mapping[str, inspect.Parameter]) -> str:
    if not allowed:
        return "; it has none, remove it"
    options = ", ".join(f"{name} = {one.default!r}" for name, one in allowed.items())
    return f"{did_you_mean(option, allowed)} Its options: {options}"


def _check_type(what: str, parameter: inspect.Parameter, value: object) -> None:
    if parameter.annotation is parameter.empty:
        return
    try:
        TypeAdapter(parameter.annotation).validate_python(value, strict=True)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigError(f"{what}: {parameter.name} = {value!r} does not fit: {reason}") from None
