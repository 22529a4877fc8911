"""Check the Host header against the names that the server answers to.

A page elsewhere can let its own name lead to this machine (DNS rebinding): the browser then takes
the server for a part of that page, which reads every photo. The name stays in the Host header.
Starlette's TrustedHostMiddleware compares that with a fixed list, which can hold neither
127.0.0.0/8 nor the address that a connection came in at.
"""

import ipaddress
import re
from collections.abc import Iterable

from crosstill.errors import ConfigError

_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,252}[a-z0-9_])?")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/?#@%\[\]]+)(:[0-9]*)?")
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def names(given: Iterable[str]) -> frozenset[str]:
    """Check names and addresses from the command line.

    Raises:
        ConfigError: one of them is neither, as with a port or a scheme.
    """
    checked = {name.lower().strip("[]") for name in given}
    for name in checked:
        if not _NAME.fullmatch(name) and _address(name) is None:
            raise ConfigError(
                f"--allowed-host {name}: give a name such as photos.example.org, or an address, "
                "without scheme and port"
            )
    return frozenset(checked)


def host_of(header: str) -> str:
    """Parse a Host header to a host, lower case, without brackets and port; "" if it is none."""
    parts = _HOST.fullmatch(header.lower())
    return parts[1].strip("[]") if parts else ""


def is_answered(host: str, own: str, allowed: frozenset[str]) -> bool:
    """Tell whether the server answers for this host.

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
