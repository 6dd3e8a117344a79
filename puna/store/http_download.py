"""Large files over HTTP that survive interruption, and servers that are wrong about what they send.

Ranges, If-Range, validators: RFC 9110, sections 8.8, 13.1.5 and 14.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import httpx

from puna import __version__
from puna.errors import SourceError
from puna.store.disk import check_space
from puna.store.part_file import PartFile
from puna.store.progress import Meter, Progress

_T = TypeVar("_T")
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_ENOUGH_PROGRESS = 1 << 20
_LONGEST_WAIT = 60.0
_MAX_JSON = 32 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True)
class Remote:
    """One file to download. ``size`` (bytes) and ``sha256`` are what it must turn out to be, where they are known.

    ``token`` goes to the host of ``url`` only. ``denied`` is the sentence for a refusal.
    """

    url: str
    file: str
    size: int | None = None
    sha256: str | None = None
    token: str | None = None
    denied: str = "the server refuses access"


class _Interrupted(Exception):
    """The attempt failed in a way that another may not; ``wait`` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Http:
    """A connection for downloads. ``retries`` counts attempts in a row that brought less than a megabyte.

    ``timeout`` is the longest silence in seconds. Sends nothing but the request, the user agent and, to its own host,
    the token.
    """

    def __init__(self, *, retries: int = 5, timeout: float = 60.0, sleep: Callable[[float], None] = time.sleep) -> None:
        self._retries, self._sleep = retries, sleep
        self._reached: set[str] = set()
        self._client = httpx.Client(
            # Coded content would make sizes and ranges mean something else than the file's bytes.
            headers={"User-Agent": f"puna/{__version__}", "Accept-Encoding": "identity"},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 15.0)),
            follow_redirects=True,  # httpx drops Authorization when the redirect leaves the origin
            max_redirects=10,
        )

    def __enter__(self) -> Http:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def get_json(self, remote: Remote, progress: Progress) -> Any:
        """The parsed answer of an API. Raises SourceError."""

        def attempt() -> Any:
            body = bytearray()
            with self._client.stream("GET", remote.url, headers=_authorization(remote)) as response:
                self._check(response, remote)
                for chunk in response.iter_raw():
                    body += chunk
                    if len(body) > _MAX_JSON:
                        raise SourceError(f"{shown(remote.url)}: the answer is longer than {_MAX_JSON} bytes")
            try:
                return json.loads(body)
            except (ValueError, RecursionError):
                raise SourceError(f"{shown(remote.url)}: the answer is not JSON; is this the right address?") from None

        return self._retrying(remote, progress, attempt, lambda: 0)

    def download(self, remote: Remote, path: Path, progress: Progress) -> tuple[str, int]:
        """Bring a file to ``path``, going on where an earlier attempt ended; return its sha256 and size.

        It goes on only where something proves that it is still the same file: the expected digest, or the server's
        strong ETag. Raises SourceError when the server cannot be reached, refuses, or sends other bytes than
        promised; StoreError when they do not fit on the disk.
        """
        with PartFile(path) as part:
            had_older_bytes = part.size > 0
            while True:
                self._retrying(remote, progress, lambda: self._attempt(remote, part, progress), lambda: part.longest)
                if remote.sha256 in (None, part.sha256):
                    part.sync()
                    return part.sha256, part.size
                wrong = part.sha256
                part.restart(None)
                if not had_older_bytes:
                    break
                progress.status(f"{remote.file}: the bytes kept from an earlier attempt were wrong; starting over")
                had_older_bytes = False
        raise SourceError(
            f"{shown(remote.url)} delivered the wrong bytes: expected sha256 {remote.sha256}, found {wrong}; "
            "nothing was stored"
        )

    def _attempt(self, remote: Remote, part: PartFile, progress: Progress) -> None:
        if part.size and part.sha256 == remote.sha256:
            return
        headers = _authorization(remote)
        if part.size and remote.sha256:
            headers["Range"] = f"bytes={part.size}-"
        elif part.size and part.etag:
            headers |= {"Range": f"bytes={part.size}-", "If-Range": part.etag}
        with self._client.stream("GET", remote.url, headers=headers) as response:
            if response.status_code == 416:
                part.restart(None)
                raise _Interrupted("the server does not have the rest of what was kept")
            self._check(response, remote)
            total = _total_size(response, part, remote)
            check_space(part.path.parent, total - part.size, remote.file)
            meter = Meter(progress, remote.file, total)
            meter.update(part.size)
            for chunk in response.iter_raw():  # as they come: a larger size would be lost with the connection
                if part.size + len(chunk) > total:
                    raise SourceError(f"{shown(remote.url)} sent more than the {total} bytes it promised")
                part.write(chunk)
                meter.update(part.size)
        if part.size < total:
            raise _Interrupted(f"the connection ended after {part.size} of {total} bytes")

    def _check(self, response: httpx.Response, remote: Remote) -> None:
        """Raise SourceError or _Interrupted unless the answer holds what was asked for."""
        where = shown(remote.url)
        self._reached.add(urlsplit(remote.url).netloc)
        schemes = {r.url.scheme for r in (*response.history, response)}
        if remote.url.startswith("https:") and schemes != {"https"}:
            raise SourceError(f"{where} redirects to an unencrypted address; nothing was stored")
        status = response.status_code
        if status in (401, 403):
            raise SourceError(f"{where}: {remote.denied} (HTTP {status})")
        if status in (404, 410):
            raise SourceError(f"{where} does not exist (HTTP {status})")
        if status in _PASSING:
            raise _Interrupted(f"HTTP {status}", _retry_after(response))
        if status not in (200, 206):
            raise SourceError(f"{where}: unexpected answer HTTP {status} {response.reason_phrase}".rstrip())
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise SourceError(f"{where}: the server sends compressed content although it was not asked for")

    def _retrying(
        self, remote: Remote, progress: Progress, attempt: Callable[[], _T], reached: Callable[[], int]
    ) -> _T:
        """Call until it succeeds. ``reached``, the most bytes so far, tells progress from going in circles."""
        failures, best = 0, reached()
        while True:
            try:
                return attempt()
            except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.TooManyRedirects) as error:
                raise SourceError(f"{shown(remote.url)} cannot be fetched: {error}") from error
            except (httpx.TransportError, _Interrupted) as error:
                reason = _reason(error)
                if isinstance(error, httpx.ConnectError) and urlsplit(remote.url).netloc not in self._reached:
                    raise SourceError(
                        f"cannot reach {shown(remote.url)}: {reason}; check the network connection and the address"
                    ) from error
                wait = error.wait if isinstance(error, _Interrupted) else 0.0
            failures = 0 if reached() - best >= _ENOUGH_PROGRESS else failures + 1
            best = max(best, reached())
            if failures > self._retries:
                raise SourceError(
                    f"{shown(remote.url)}: gave up after {failures} attempts: {reason}; "
                    "pull again later to go on where it ended"
                )
            wait = min(max(wait, 2.0 ** (failures - 1)), _LONGEST_WAIT)
            progress.status(f"{remote.file}: {reason}; trying again in {wait:.0f} s")
            self._sleep(wait)


def shown(url: str) -> str:
    """An address without what may be secret in it: user, password, query, fragment."""
    try:
        parts = urlsplit(url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    except ValueError:
        return url


def _authorization(remote: Remote) -> dict[str, str]:
    return {"Authorization": f"Bearer {remote.token}"} if remote.token else {}


def _total_size(response: httpx.Response, part: PartFile, remote: Remote) -> int:
    """The size of the whole file, after making ``part`` ready for the bytes that follow."""
    total: str | None
    if response.status_code == 206:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != part.size:
            part.restart(None)
            raise _Interrupted("the server sent another range than was asked for")
        total = match[2]
    else:  # the range was ignored, or the file has changed
        part.restart(response.headers.get("ETag"))
        total = response.headers.get("Content-Length")
    size = int(total) if total is not None and total.isdecimal() else remote.size
    if size is None:
        raise SourceError(
            f"{shown(remote.url)}: the server does not say how large the file is, so a whole file cannot be told from "
            "a broken one; download it in another way and use `puna import`"
        )
    if remote.size is not None and size != remote.size:
        part.restart(None)
        raise SourceError(f"{shown(remote.url)}: expected {remote.size} bytes, but the server offers {size}")
    return size


def _retry_after(response: httpx.Response) -> float:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else 0.0


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "the server does not answer in time"
    return str(error) or type(error).__name__
