"""What a request passes before it is answered: a key, a pace, room, and a body of a size that can be.

The door stands before the application, so that a stranger's bytes are counted before anything reads them. What it
refuses it refuses in OpenAI's shape: 400 under a name that is not this machine's, 401 without a key, 408 for a body
that does not come, 413 for one that is too large, 429 with `Retry-After` when there are too many, 503 while nothing is
answered at all. A place is taken until the last byte of the answer has left, and a reader who stops reading loses the
answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import stat
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fedcompose.errors import ConfigError
from fedcompose.files import read_limited

MAX_BODY_BYTES = 4 << 20  # a prompt of a million characters, in UTF-8
MAX_IN_FLIGHT = 128  # answers that are written or waited for; more would only wait longer
LINGER_BYTES = 16 << 20  # of a body that is too large, to be read before it is refused
BODY_SECONDS = 30.0  # for a body to arrive in full
STALLED_SECONDS = 60.0  # a reader who takes nothing for so long has gone
BUSY_SECONDS = 2  # after which to come again when there is no room
MAX_KEYS_BYTES = 64 << 10

OPEN_PATHS = ("/", "/health", "/ready")  # which tell nothing about anybody's use
ANYBODY = "anybody"  # who asks where no keys are asked for

_KEY = re.compile(r"(?P<name>[a-z0-9][a-z0-9_-]{0,62}) +(?P<key>[A-Za-z0-9_.-]{24,256})", re.ASCII)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

log = logging.getLogger(__name__)


class TurnedAwayError(Exception):
    """A request that is not let in."""

    def __init__(self, status: int, code: str, message: str, retry_s: float | None = None) -> None:
        super().__init__(code)
        self.status, self.code, self.message, self.retry_s = status, code, message, retry_s

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        found = [(b"content-type", b"application/json")]
        if self.retry_s is not None:
            found.append((b"retry-after", str(max(1, ceil(self.retry_s))).encode()))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        return found

    @property
    def body(self) -> bytes:
        kind = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}
        about = {"message": self.message, "type": kind.get(self.status, "invalid_request_error")}
        return json.dumps({"error": {**about, "param": None, "code": self.code}}).encode()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _GoneError(Exception):
    """Nobody is at the other end any more."""


def read_api_keys(path: Path) -> dict[str, bytes]:
    """Who may ask: a name and a key on each line. Of a key only its SHA-256 is kept.

    Raises: ConfigError: `API_KEYS_INVALID`, never with anything of the file in it.
    """
    data = read_limited(path, MAX_KEYS_BYTES)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise _bad_keys("others can read it", f"chmod 600 {path}")
    keys: dict[str, bytes] = {}
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _KEY.fullmatch(line.strip())
        if match is None or match["name"] in keys:
            raise _bad_keys(f"line {number} is none, or a name comes twice")
        keys[match["name"]] = hashlib.sha256(match["key"].encode()).digest()
    if not keys:
        raise _bad_keys("no key at all")
    return keys


def _bad_keys(
    got: str, fix: str = "python -c 'import secrets; print(\"me\", secrets.token_urlsafe(32))'"
) -> ConfigError:
    return ConfigError(
        "API_KEYS_INVALID",
        "the file of API keys cannot be used",
        expected="on each line a name, a space and a key of at least 24 letters, digits, - _ .",
        got=got,
        fix=fix,
    )


@dataclass
class Bucket:
    """Requests that may come at once, refilled at a steady pace."""

    per_second: float
    size: float
    level: float
    at: float

    def take(self, now: float) -> float | None:
        """None when there was one to take; otherwise the seconds until there is."""
        self.level = min(self.size, self.level + (now - self.at) * self.per_second)
        self.at = now
        if self.level < 1:
            return (1 - self.level) / self.per_second
        self.level -= 1
        return None


@dataclass
class Door:
    """Who is let in. `keys` as `read_api_keys` gives them; without them anybody is, as on this machine alone.

    `closed` is why nobody is answered, a code. `seen` is told the path and status of every answer.
    """

    keys: Mapping[str, bytes] = field(default_factory=dict)
    per_minute: int | None = None
    max_in_flight: int = MAX_IN_FLIGHT
    max_body: int = MAX_BODY_BYTES
    clock: Callable[[], float] = time.monotonic
    seen: Callable[[str, int], object] = lambda path, status: None
    closed: str | None = None
    in_flight: int = 0
    _buckets: dict[str, Bucket] = field(default_factory=dict)

    def check_host(self, host: str) -> None:
        """Without keys only who calls this machine by an own name or address: else any web page could call its server
        by a name that its owner made point here.

        Raises: TurnedAwayError: 400.
        """
        if not self.keys and not is_loopback(_without_port(host)):
            raise TurnedAwayError(400, "host_unknown", "this server answers as localhost or 127.0.0.1 only")

    def who(self, authorization: str) -> str:
        """Whose key this is. All keys are compared, each in constant time, so that time tells nothing.

        Raises: TurnedAwayError: 401.
        """
        if not self.keys:
            return ANYBODY
        given = hashlib.sha256(authorization.removeprefix("Bearer ").encode()).digest()
        found = [name for name, known in self.keys.items() if hmac.compare_digest(given, known)]
        if not found:
            raise TurnedAwayError(
                401, "invalid_api_key", "this server wants a key that it knows: Authorization: Bearer KEY"
            )
        return found[0]

    def enter(self, who: str) -> None:
        """Take a place, to be given back with `leave`.

        Raises: TurnedAwayError: 503 while closed, 429 when `who` comes too often or there is no room.
        """
        if self.closed is not None:
            raise TurnedAwayError(
                503, self.closed.lower(), f"nothing is answered here now ({self.closed})", BUSY_SECONDS
            )
        if (wait := self._pace(who)) is not None:
            raise TurnedAwayError(429, "rate_limit_exceeded", f"more than {self.per_minute} requests a minute", wait)
        if self.in_flight >= self.max_in_flight:
            raise TurnedAwayError(
                429, "server_busy", f"{self.in_flight} requests are being answered already", BUSY_SECONDS
            )
        self.in_flight += 1

    def leave(self) -> None:
        self.in_flight -= 1

    def _pace(self, who: str) -> float | None:
        if self.per_minute is None:
            return None
        now = self.clock()
        size = max(1.0, self.per_minute / 6)  # ten seconds' worth may come at once
        return self._buckets.setdefault(who, Bucket(self.per_minute / 60, size, size, now)).take(now)


class Gate:
    """ASGI middleware around an application: every HTTP request passes the door."""

    def __init__(self, app: Application, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(send, self.door.clock())
        try:
            await self._pass(scope, receive, answer)
        except TurnedAwayError as refusal:
            await answer.refuse(refusal)
        except _GoneError:
            log.info("a reader has gone")
        finally:
            self.door.seen(scope["path"], answer.status)
            seconds = round(self.door.clock() - answer.began, 3)
            log.info("answered", extra={"status": answer.status, "seconds": seconds})

    async def _pass(self, scope: MutableMapping[str, Any], receive: Receive, answer: _Answer) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self.door.check_host(headers.get("host", ""))
        if scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, answer.send)
            return
        who = self.door.who(headers.get("authorization", ""))
        if scope["method"] != "POST":
            await self.app(scope, receive, answer.send)
            return
        self.door.enter(who)
        try:
            body = await self._body(headers.get("content-length", ""), receive)
            await self.app(scope, _replay(body, receive), answer.send)
        finally:
            self.door.leave()

    async def _body(self, length: str, receive: Receive) -> bytes:
        """The whole body, if it is small enough and comes in time."""
        if length.isdigit() and (len(length) > 15 or int(length) > self.door.max_body + LINGER_BYTES):
            raise self._too_large()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return await self._read(receive)
        except TimeoutError:
            raise TurnedAwayError(408, "body_timeout", "the body did not arrive in time") from None

    async def _read(self, receive: Receive) -> bytes:
        """A body that is a little too large is read to its end and dropped: only then do senders hear the refusal."""
        parts: list[bytes] = []
        size, more = 0, True
        while more and size <= self.door.max_body + LINGER_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            piece = message.get("body", b"")
            size += len(piece)
            if size <= self.door.max_body:
                parts.append(piece)
            else:
                parts.clear()
            more = message.get("more_body", False)
        if size > self.door.max_body:
            raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> TurnedAwayError:
        return TurnedAwayError(413, "body_too_large", f"the body is larger than {self.door.max_body} bytes")


class _Answer:
    """The way back: remembers the status, and gives up on a reader who stalls."""

    def __init__(self, send: Send, began: float) -> None:
        self._send, self.began, self.status = send, began, 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        try:
            async with asyncio.timeout(STALLED_SECONDS):
                await self._send(message)
        except TimeoutError:
            raise _GoneError from None

    async def refuse(self, refusal: TurnedAwayError) -> None:
        """Also says to close: what of the body was not read would stand before the next request."""
        headers = [*refusal.headers, (b"connection", b"close")]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": refusal.body})


def _without_port(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # an unfinished IPv6 address
        return ""


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out the body once and then what comes after it, a disconnection."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
