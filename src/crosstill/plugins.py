"""Find a part by name: a loss, a balancer, a model family, a data format, an index and so on.

A part is a module of its kind's package, or an entry point that another installed distribution
declares in the group of that kind (`docs/extending.md` lists the groups). Nothing is imported
before it is asked for by name, so that listing names costs no import of torch or of an optional
library.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from crosstill.errors import ConfigError, did_you_mean, unknown

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Part = TypeVar("Part")


@dataclass(frozen=True)
class Kind:
    """One kind of part.

    Attributes:
        group: the entry point group of other distributions; where `own` is None, also the package
            that holds our own parts.
        noun: the word for a part of this kind in messages.
        own: our own parts, name to "module" or "module:attribute"; None means that each module
            of the package is a part under its own name, and its folders hold what parts share.
        shared: modules of the package that are no parts.
    """

    group: str
    noun: str
    own: Mapping[str, str] | None = None
    shared: frozenset[str] = frozenset({"base"})

    def names(self) -> list[str]:
        """Return the names of all parts, ours and those of other distributions, sorted."""
        return sorted(self.in_order())

    def in_order(self) -> list[str]:
        """Return the names of all parts, ours in the order of their table before others'."""
        others = sorted(point.name for point in self._others())
        return list(dict.fromkeys([*self._own(), *others]))

    def check(self, name: str) -> None:
        """Refuse a name that no part has, without importing anything.

        Raises:
            ConfigError: there is none; the message gives the nearest name.
        """
        if name not in self.in_order():
            raise unknown(self.noun, name, self.names())

    def find(self, name: str) -> Any:
        """Import the part of that name. Our own wins over another distribution's.

        Raises:
            ConfigError: there is none, there are several, or it cannot be imported.
        """
        if name in (own := self._own()):
            module, _, attribute = own[name].partition(":")
            part = import_module(module)
            return getattr(part, attribute) if attribute else part
        self.check(name)
        points = [point for point in self._others() if point.name == name]
        if len(points) > 1:
            offering = " and ".join(sorted(_distribution(point) for point in points))
            raise ConfigError(
                f"{self.noun} {name!r} is offered by {offering}; uninstall all but one of them"
            )
        (point,) = points
        try:
            return point.load()
        except Exception as error:  # importing other people's code may raise anything
            raise ConfigError(
                f"{self.noun} {name!r}: {point.value} of {_distribution(point)} cannot be "
                f"imported: {error or type(error).__name__}; mend or uninstall it"
            ) from error

    def find_class(self, name: str, base: type[Part]) -> type[Part]:
        """Import the class of that name: the part itself, or the only `base` its module defines.

        Raises:
            ConfigError: as `find`, or there is not exactly one such class, or its name has a dot,
                which keys of settings and of saved states are split at.
        """
        part = self.find(name)
        if "." in name:
            raise ConfigError(
                f"{self.noun} {name!r}: its name has a dot; its maker has to rename it"
            )
        place = getattr(part, "__name__", repr(part))
        values = [part] if isinstance(part, type) else getattr(part, "__dict__", {}).values()
        classes = [value for value in values if isinstance(value, type) and issubclass(value, base)]
        if not isinstance(part, type):  # imported classes are another module's
            classes = [value for value in classes if value.__module__ == place]
        if len(classes) != 1:
            raise ConfigError(
                f"{self.noun} {name!r}: {place} defines {len(classes)} subclasses of "
                f"{base.__module__}.{base.__name__}; define one"
            )
        return classes[0]

    def _own(self) -> Mapping[str, str]:
        if self.own is not None:
            return self.own
        modules = pkgutil.iter_modules(import_module(self.group).__path__)
        names = (module.name for module in modules if not module.ispkg)
        return {name: f"{self.group}.{name}" for name in names if name not in self.shared}

    def _others(self) -> list[EntryPoint]:
        # here, as `crosstill --help` should not wait for it, nor for pydantic below
        from importlib.metadata import entry_points

        return list(entry_points(group=self.group))


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value


def options(plugin: type) -> dict[str, inspect.Parameter]:
    """Return the named arguments of a class, in their order."""
    open_ended = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(plugin, eval_str=True).parameters
    return {k: v for k, v in parameters.items() if v.kind not in open_ended}


def spelt_out(
    plugin: type, given: Collection[str], chosen: Mapping[str, object]
) -> dict[str, object]:
    """Return all options of a part: those that the user chose, and else the class's defaults.

    Args:
        plugin: the class.
        given: names of the arguments that the program supplies; they are no options.
        chosen: the user's options.
    """
    own = {k: v.default for k, v in options(plugin).items() if k not in given}
    return {k: v for k, v in own.items() if v is not inspect.Parameter.empty} | dict(chosen)


def construct(
    plugin: type, what: str, given: Mapping[str, object], chosen: Mapping[str, object]
) -> Any:
    """Make a part from the arguments of its package and the options of the user.

    Args:
        plugin: the class.
        what: the part in messages, such as "loss 'contrastive'".
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
    from pydantic import TypeAdapter, ValidationError

    try:
        TypeAdapter(parameter.annotation).validate_python(value, strict=True)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ConfigError(f"{what}: {parameter.name} = {value!r} does not fit: {reason}") from None
