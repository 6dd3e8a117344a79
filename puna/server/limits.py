"""How much the server takes on: the size of bodies, the length of the queue, the rates of each key."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from puna.errors import RequestError
from puna.server.http_errors import refuse
from puna.server.keys import Key, Keys
from puna.server.policy import body_limit, policy_of

Clock = Callable[[], float]
RETRY_SECONDS = 1
BODY_SECONDS = 60.0
HEADER_LIMIT = 1 << 16  # where the HTTP parser has none of its own
_CLOSE = {"Connection": "close"}
_WHILE_DRAINING = ("/livez", "/health", "/metrics")


@dataclass
class Bucket:
    """A token bucket: full with a minute's worth, refilled evenly. ``level`` may be below nothing after ``take``."""

    per_minute: int
    clock: Clock
    level: float = field(init=False)
    filled: float = field(init=False)

    def __post_init__(self) -> None:
        self.level = self.per_minute
        self.filled = self.clock()

    def wait(self) -> float:
        """Seconds until there is one; 0 when there is."""
        now = self.clock()
        self.level = min(self.per_minute, self.level + (now - self.filled) * self.per_minute / 60)
        self.filled = now
        return max(0.0, (1 - self.level) * 60 / self.per_minute)

    def take(self, count: int) -> None:
        self.wait()
        self.level -= count


class Limits:
    """The queue that all share, and what each key may use."""

    def __init__(self, keys: Keys | None = None, capacity: float = math.inf, clock: Clock = time.monotonic) -> None:
        """At most ``capacity`` requests are in the server at once, from their arrival to the end of the answer."""
        self.keys = keys or Keys()
        self.capacity = capacity
        self.in_server = 0
        self.draining = False
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def check_rates(self, tenant: str) -> tuple[str, float] | None:
        """Count a request of that tenant; or what it must wait for, and how many seconds."""
        key = self._key(tenant)
        if key is None:
            return None
        for what in ("requests", "tokens"):
            bucket = self._bucket(key, what)
            wait = 0.0 if bucket is None else bucket.wait()
            if wait:
                return f"the key {tenant} has used its {what} of this minute", wait
        requests = self._bucket(key, "requests")
        if requests is not None:
            requests.take(1)
        return None

    def charge(self, tenant: str, tokens: int) -> None:
        """Take tokens that a tenant has used; when more than it had, its next request waits for longer."""
        key = self._key(tenant)
        bucket = None if key is None else self._bucket(key, "tokens")
        if bucket is not None:
            bucket.take(tokens)

    def answer_tokens(self, tenant: str, wanted: int | None) -> int | None:
        """How many tokens an answer may have when that many are wanted. Raises RequestError when it may not."""
        key = self._key(tenant)
        if key is None or key.max_tokens is None:
            return wanted
        if wanted is not None and wanted > key.max_tokens:
            raise RequestError(
                f"the key {tenant} may have at most {key.max_tokens} tokens an answer, but {wanted} were asked for; "
                "ask for fewer"
            )
        return key.max_tokens if wanted is None else wanted

    def _key(self, tenant: str) -> Key | None:
        """What follows a slash is a share of the tenant's own, such as its batches, under the same limits."""
        return self.keys.named(tenant.partition("/")[0])

    def _bucket(self, key: Key, what: str) -> Bucket | None:
        per_minute = key.requests_per_minute if what == "requests" else key.tokens_per_minute
        if per_minute is None:
            return None
        bucket = self._buckets.get((key.name, what))
        if bucket is None or bucket.per_minute != per_minute:
            bucket = self._buckets[key.name, what] = Bucket(per_minute, self._clock)
        return bucket


class LimitRequests:
    """Refuses what is too much, at the moment of its arrival. Comes after Auth, which says whom a request is from."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limits = self.limits
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_LIMIT:
            return await refuse(scope, receive, send, 431, f"the headers are longer than {HEADER_LIMIT} bytes", _CLOSE)
        if limits.draining and scope["path"] not in _WHILE_DRAINING:
            headers = {"Retry-After": str(RETRY_SECONDS), "Connection": "close"}
            return await refuse(scope, receive, send, 503, "the server is stopping", headers)
        if policy_of(scope["method"], scope["path"]) != "generate":
            return await self._bounded(scope, receive, send)
        if limits.in_server >= limits.capacity:
            message = f"the server is busy with {limits.in_server} requests; try again soon"
            return await refuse(scope, receive, send, 503, message, {"Retry-After": str(RETRY_SECONDS)})
        too_fast = limits.check_rates(scope["state"]["tenant"])
        if too_fast is not None:
            message, seconds = too_fast
            headers = {"Retry-After": str(max(1, math.ceil(seconds)))}
            return await refuse(scope, receive, send, 429, f"{message}; try again in {math.ceil(seconds)} s", headers)
        limits.in_server += 1
        try:
            return await self._bounded(scope, receive, send)
        finally:
            limits.in_server -= 1

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request with a body that is no longer than its route's limit, and that keeps coming."""
        limit = body_limit(scope["path"])
        too_long = 413, f"the body is longer than {limit} bytes; send less"
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and (len(length) > 18 or int(length) > limit):
            return await refuse(scope, receive, send, *too_long, _CLOSE)
        size = 0
        whole = started = False
        problem: tuple[int, str] | None = None

        async def receiving() -> Message:
            nonlocal size, whole, problem
            if whole:  # what comes now is that the client leaves
                return await receive()
            try:
                part = await asyncio.wait_for(receive(), BODY_SECONDS)
            except asyncio.TimeoutError:
                problem = 408, f"nothing of the body came for {BODY_SECONDS} seconds"
                raise _BadBody from None
            whole = not part.get("more_body", False)
            size += len(part.get("body", b""))
            if size > limit:
                problem = too_long
                raise _BadBody
            return part

        async def sending(part: Message) -> None:
            nonlocal started
            # A route that turned _BadBody into an error of its own is corrected here.
            if problem is not None and not started:
                raise _BadBody
            started = True
            await send(part)

        try:
            await self.app(scope, receiving, sending)
        except _BadBody:
            if problem is not None and not started:
                await refuse(scope, receive, send, *problem, _CLOSE)


class _BadBody(Exception):
    """A body went on after its limit, or did not go on."""
