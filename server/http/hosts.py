"""Without keys, only this machine's own names and pages: what a web page must not reach.

Any page that a browser shows may send requests to a server on the same machine, or behind the same
router, and by a name of its own that changes its address (DNS rebinding) read the answers. So where
no API key is needed

    Host      has to be localhost, a loopback address, the address that was bound or that the
              connection came to, or one of --allowed-hosts
    Origin    has to be the Host's, or one of --allowed-origins

A browser names the page's host in both, whatever the address behind it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from headstart.server.http.errors import APIError, error_response

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/?#@\s]+)(?::(\d{0,5}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


class LocalHosts:
    """ASGI middleware: a 403 for requests under another name, or from a page of another site.

    ``hosts``: names and addresses that are allowed beside the loopback's; "*" is all. ``origins``:
    as those of CORS, whose preflight requests have to pass, too.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], origins: Sequence[str]) -> None:
        self._app = app
        self._hosts = {canonical(host) for host in hosts}
        self._origins = set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)) is not None:
            await error_response(refusal, scope)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> APIError | None:
        hosts, origins = (_sent(scope, name) for name in (b"host", b"origin"))
        if not self._is_allowed_host(hosts, scope):
            return APIError(
                403,
                f"{_shown('Host', hosts)} is not allowed: a server without keys answers to "
                "localhost, to its own address and to what --allowed-hosts names; or set keys "
                "(--api-key-file)",
                code="host_not_allowed",
            )
        if not self._is_allowed_origin(origins, hosts):
            return APIError(
                403,
                f"{_shown('Origin', origins)} is not allowed: a server without keys answers pages "
                "of its own address and those that --allowed-origins names",
                code="origin_not_allowed",
            )
        return None

    def _is_allowed_host(self, sent: Sequence[str], scope: Scope) -> bool:
        if "*" in self._hosts:
            return True
        if not sent:
            # Browsers always send one; of others, HTTP/1.1 wants it.
            return scope["http_version"] in ("0.9", "1.0")
        if len(sent) > 1 or (authority := _HOST.fullmatch(sent[0])) is None:
            return False
        host = canonical(authority[1])
        accepted = scope.get("server") or ("", None)
        return (
            host == "localhost"
            or _is_loopback(host)
            or host in self._hosts
            or (_is_address(host) and host == canonical(accepted[0]))
        )

    def _is_allowed_origin(self, sent: Sequence[str], hosts: Sequence[str]) -> bool:
        if not sent or "*" in self._origins:
            return True
        if len(sent) > 1:
            return False
        scheme, _, authority = sent[0].partition("://")
        same = bool(hosts) and _place(authority, scheme) == _place(hosts[0], scheme) is not None
        return same or sent[0] in self._origins


def canonical(host: str) -> str:
    """A name in lower case, without the dot of the root; an address in its one form."""
    name = host.lower().strip("[]").removesuffix(".")
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return str(address)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def _place(authority: str, scheme: str) -> tuple[str, str] | None:
    """Host and port of what stands in a Host or behind an Origin's scheme."""
    if (match := _HOST.fullmatch(authority)) is None or scheme not in _DEFAULT_PORTS:
        return None
    return canonical(match[1]), match[2] or _DEFAULT_PORTS[scheme]


def _sent(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key == name]


def _shown(name: str, values: Sequence[str]) -> str:
    if not values:
        return f"a request without {name}"
    return f"the {name} {', '.join(values)[:100]!r}"


def described(hosts: Sequence[str]) -> str:
    """Who may ask, for the log."""
    if "*" in hosts:
        return "any Host (--allowed-hosts *)"
    named = [host for host in dict.fromkeys(map(canonical, hosts)) if not _is_unspecific(host)]
    return ", ".join((*named, "localhost and this machine's addresses only (see --allowed-hosts)"))


def _is_unspecific(host: str) -> bool:
    """What is allowed anyhow, or stands for all of the machine's addresses."""
    if not _is_address(host):
        return host == "localhost"
    address = ipaddress.ip_address(host)
    return address.is_loopback or address.is_unspecified
