"""Rates: how many requests and tokens each caller may have in a minute.

A caller is an API key or, without keys, an address. Each has two buckets that hold a minute's worth
and fill evenly, so a caller that was quiet may spend a minute's worth at once:

    level   limit ──╲                ╱── filled again: limit / 60 a second
                     ╲    ╱╲        ╱
              0 ──────╲__╱  ╲______╱───── refused while there is not enough
                             ╲____╱       what an answer took more than was thought is owed
"""

from __future__ import annotations

import ipaddress

MINUTE = 60.0


class Bucket:
    """``limit``: what it holds, and gets in a minute. Times are in seconds of any steady clock."""

    __slots__ = ("_at", "_level", "limit")

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._level = float(limit)
        self._at = now

    def level(self, now: float) -> float:
        """What may be spent; below 0 where more was taken than there was."""
        return min(self._level + max(now - self._at, 0.0) * self.limit / MINUTE, self.limit)

    def take(self, amount: float, now: float) -> None:
        """Spend ``amount``, whatever there is; a negative one is given back."""
        self._level = min(self.level(now) - amount, self.limit)
        self._at = max(now, self._at)

    def wait(self, amount: float, now: float) -> float:
        """Seconds until ``amount`` may be spent; 0: now. What is more than a whole minute's worth
        may be spent when the bucket is full: it would wait for ever else."""
        lacking = min(amount, self.limit) - self.level(now)
        return max(lacking, 0.0) * MINUTE / self.limit

    def full_in(self, now: float) -> float:
        """Seconds until nothing of it is spent."""
        return (self.limit - self.level(now)) * MINUTE / self.limit


def address_of(host: str) -> str:
    """Who an address is: the first half of an IPv6 one, since whoever has one has them all."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address)


def duration(seconds: float) -> str:
    """As OpenAI writes how long something takes: ``17ms``, ``1.2s``, ``6m0s``."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    if seconds < MINUTE:
        return f"{round(seconds, 1):g}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest}s"
