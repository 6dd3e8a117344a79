"""/api/pull, push and create: long work on files, told in status lines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter
from starlette.responses import Response

from puna.errors import RequestError, StoreError
from puna.llm.create import create
from puna.quantize import quantizer
from puna.server.ollama.bodies import CreateBody, JsonRoute, PullBody, PushBody
from puna.server.ollama.streaming import Answer, Line
from puna.server.service import TheService
from puna.store import Progress, pull
from puna.store.names import catalog_entry

router = APIRouter(route_class=JsonRoute)


class _GivenUp(Exception):
    """Nobody waits for the work any more."""


class _Teller:
    """Progress of work in another thread, as status lines in the event loop. Ends the work when nobody listens."""

    def __init__(self, describe: Callable[[str], Line]) -> None:
        """``describe`` begins the lines of a transfer of that label."""
        self.given_up = False
        self._describe = describe
        self._loop = asyncio.get_running_loop()
        self._lines: asyncio.Queue[Line | BaseException | None] = asyncio.Queue()

    def status(self, text: str) -> None:
        self._tell({"status": text})

    def transfer(self, label: str, done: int, total: int, speed: float) -> None:
        self._tell({**self._describe(label), "total": total, "completed": done})

    def end(self, error: BaseException | None) -> None:
        self._put(error)

    async def next(self) -> Line | BaseException | None:
        """A line, what the work failed with, or None at its end."""
        return await self._lines.get()

    def _tell(self, line: Line) -> None:
        if self.given_up:
            raise _GivenUp
        self._put(line)

    def _put(self, item: Line | BaseException | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._lines.put_nowait, item)


async def work_lines(
    work: Callable[[Progress], Any],
    describe: Callable[[str], Line],
    before: Sequence[str] = (),
    after: Sequence[str] = (),
) -> AsyncGenerator[Line, None]:
    """The lines of work that runs in a thread of its own, and ends at its next sign of progress when nobody listens.

    ``describe`` gives the status, and a digest where there is one, of what is transferred under a label.

    Not in the event loop's pool of threads: hours of downloads would fill it. Raises what the work raises.
    """
    teller = _Teller(describe)

    def run() -> None:
        try:
            work(teller)
        except BaseException as error:
            teller.end(error)
        else:
            teller.end(None)

    for status in before:
        yield {"status": status}
    threading.Thread(target=run, name="puna-files", daemon=True).start()
    try:
        while (item := await teller.next()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        teller.given_up = True
    for status in (*after, "success"):
        yield {"status": status}


def last_line(lines: Sequence[Line]) -> Line:
    """What a client gets that wants no stream."""
    return lines[-1]


@router.post("/api/pull", summary="Fetch a model")
async def pull_model(body: PullBody, service: TheService) -> Response:
    """From the catalog, Hugging Face (`owner/name[:QUANT]`) or the address of a .gguf file, never a path here.

    A client that disconnects ends it; what came is kept, and another pull goes on from there.
    """
    what = _source_of(body)
    entry = catalog_entry(what)
    files = [source for source in (entry.sources if entry else ()) if source.file and source.sha256]
    digests = {(source.file or "").rpartition("/")[2]: f"sha256:{source.sha256}" for source in files}

    def describe(file: str) -> Line:
        return {"status": f"pulling {file}"} | ({"digest": digests[file]} if file in digests else {})

    lines = work_lines(
        lambda progress: pull(what, store=service.store, progress=progress, paths=False),
        describe,
        ["pulling manifest"],
        ["verifying sha256 digest", "writing manifest"],
    )
    return Answer(lines, last_line if body.stream is False else None)


def _source_of(body: PullBody) -> str:
    """Raises RequestError for an address without encryption that is not said to be all right."""
    try:
        scheme = urlsplit(body.which).scheme.lower()
    except ValueError as error:
        raise RequestError(f"model: {body.which[:200]!r} is not an address: {error}") from None
    if scheme == "http" and not body.insecure:
        raise RequestError("model: the address is not encrypted; use https, or send insecure: true")
    return body.which


@router.post("/api/create", summary="Make a model from another one, or from files that were sent")
async def create_model(body: CreateBody, service: TheService) -> Response:
    """A stored model (`from`) or files (`files`, from /api/blobs) with a template, parameters or messages of its own.

    It replaces a model of the same name, all or nothing. With `quantize` its weights, which must have 16 or 32 bits,
    become of that type.
    """
    for name, remedy in (
        ("renderer", "give a template"),
        ("parser", "how a model calls tools is told from its template"),
    ):
        if getattr(body, name):
            raise RequestError(f"{name}: not in this version; {remedy}")
    quantizing = quantizer(body.quantize, service.settings.threads) if body.quantize else None
    messages = [message.plain() for message in body.messages or ()]

    def work(progress: Progress) -> None:
        if body.from_ is not None:
            service.store.find(body.from_)
        try:
            create(
                service.store,
                body.which,
                from_=body.from_,
                files=body.files,
                template=body.template,
                system=body.system,
                parameters=body.parameters,
                license=body.license,
                messages=messages,
                adapters=body.adapters,
                quantize=quantizing,
                paths=False,
                progress=progress,
            )
        except StoreError as error:
            if isinstance(error.__cause__, OSError):
                raise
            raise RequestError(str(error)) from None

    return Answer(work_lines(work, _of_create), last_line if body.stream is False else None)


def _of_create(what: str) -> Line:
    return {"status": what, "digest": "0"}  # as ollama has it: its command shows a bar for each digest


@router.post("/api/push", summary="Refused: there is nowhere to push to")
async def push(body: PushBody, service: TheService) -> Response:
    """Always 400."""
    raise RequestError(
        "push: Puna has no registry to send models to; `puna convert` exports a model to a file or folder that "
        "Hugging Face and others take"
    )
