"""Runs batches beside everything else: a few lines at a time, each kept as soon as it is done.

Every server of a store looks for batches that nobody runs; a lock on each sees to it that only one does. What a killed
server had begun is so taken up by the next, which repeats no line but those that were being computed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from puna.errors import CapacityError, PunaError
from puna.server.batch_journal import Journal
from puna.server.file_store import FileStore
from puna.server.http_errors import error_content, status_of
from puna.server.openai.batch_lines import ENDPOINTS, Line, check_lines, numbered_lines, read_line
from puna.server.records import Record, Records, abandoned, new_id, private_folder, state_errors, write_whole
from puna.server.sending import to_json
from puna.server.service import Service
from puna.store.lock import file_lock

LINES_AT_ONCE = 16  # of all batches of a server
RESCAN = 30.0  # seconds: how soon the batches of a server that died are taken up
SHARE = "batch"  # all batches of a tenant share the machine with its other tenants as one more would
_ENDED = ("completed", "failed", "expired", "cancelled")
_log = logging.getLogger(__name__)


class _HeldElsewhere(Exception):
    """Another server runs the batch."""


class BatchStore:
    """``<id>.json`` is a batch as its users see it (and more, under names with _); the folder ``<id>`` is its work:
    ``input.jsonl``, ``journal.jsonl``, ``lock``, and ``cancel`` once that is wanted. It goes when the batch ends."""

    def __init__(self, home: Path) -> None:
        """``home`` is the store's."""
        self.records = Records(home / "server" / "batches", "batch")
        self.files = FileStore(home)

    def create(self, tenant: str, record: Record) -> Record:
        """Begin a batch, with an input of its own. Raises NotFoundError for a file that is not the tenant's."""
        source = self.files.content(tenant, record["input_file_id"])
        folder = self.folder(record["id"])
        with state_errors(folder):
            private_folder(folder)
            try:
                (folder / "input.jsonl").hardlink_to(source)
            except OSError:
                shutil.copyfile(source, folder / "input.jsonl")
        self.records.write(tenant, {**record, "_output": new_id("file-"), "_errors": new_id("file-")})
        return self.read(tenant, record["id"])

    def read(self, tenant: str, batch_id: str) -> Record:
        """A batch as its users see it. Raises NotFoundError."""
        return self._shown(self.records.read(tenant, batch_id))

    def of(self, tenant: str) -> list[Record]:
        """A tenant's batches, the newest first."""
        return [self._shown(record) for record in self.records.of(tenant)]

    def cancel(self, batch_id: str) -> None:
        """Ask whoever runs the batch to end it."""
        with state_errors(self.folder(batch_id)), suppress(FileNotFoundError):  # it has ended meanwhile
            write_whole(self.folder(batch_id) / "cancel", b"")

    def cancelled(self, batch_id: str) -> int | None:
        """When that was asked, in seconds since 1970."""
        with suppress(FileNotFoundError):
            return int((self.folder(batch_id) / "cancel").stat().st_mtime)
        return None

    def unfinished(self) -> list[tuple[str, str]]:
        """Tenant and id of every batch that has not ended, the oldest first."""
        found = [(tenant, record["id"]) for tenant, record in self.records.all() if record["status"] not in _ENDED]
        return found[::-1]

    def clean(self) -> None:
        """Remove the folders of batches that were killed before they began."""
        self.records.clean()
        with state_errors(self.records.folder):
            for path in self.records.folder.glob("batch_*"):
                if path.is_dir() and not path.with_suffix(".json").exists() and abandoned(path):
                    shutil.rmtree(path, ignore_errors=True)

    def folder(self, batch_id: str) -> Path:
        return self.records.folder / batch_id

    def _shown(self, record: Record) -> Record:
        shown = {name: value for name, value in record.items() if not name.startswith("_")}
        asked = None if record["status"] in _ENDED else self.cancelled(record["id"])
        return shown if asked is None else {**shown, "status": "cancelling", "cancelling_at": asked}


class BatchRunner:
    """Takes up batches from its start to its ``close``."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._store = BatchStore(service.store.home)
        self._places = asyncio.Semaphore(LINES_AT_ONCE)
        self._wake = asyncio.Event()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._watch = asyncio.create_task(self._run())

    def wake(self) -> None:
        """There may be something new to do."""
        self._wake.set()

    async def close(self) -> None:
        """Stop. Lines that are being computed are computed again by the next server."""
        tasks = [self._watch, *self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                for tenant, batch_id in await asyncio.to_thread(self._store.unfinished):
                    if batch_id not in self._running:
                        task = asyncio.create_task(self._run_one(tenant, batch_id))
                        self._running[batch_id] = task
                        task.add_done_callback(partial(self._forget, batch_id))
            except PunaError as error:
                _log.error("batches: %s", error)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), RESCAN)

    def _forget(self, batch_id: str, _task: asyncio.Task[None]) -> None:
        del self._running[batch_id]

    async def _run_one(self, tenant: str, batch_id: str) -> None:
        try:
            with _hold(self._store.folder(batch_id)):
                record = await asyncio.to_thread(self._store.records.read, tenant, batch_id)
                if record["status"] not in _ENDED:
                    await _Run(self._service, self._store, self._places, tenant, record).to_its_end()
                await asyncio.to_thread(shutil.rmtree, self._store.folder(batch_id), True)
        except _HeldElsewhere:
            pass
        except Exception as error:
            # The disk is full, or a file was damaged: the batch stays as it is, and is tried again later.
            _log.error("%s: %s", batch_id, error)


class _Run:
    """One batch, by the holder of its lock."""

    def __init__(
        self, service: Service, store: BatchStore, places: asyncio.Semaphore, tenant: str, record: Record
    ) -> None:
        self._service = service
        self._store = store
        self._places = places
        self._tenant = tenant
        self._record = record
        self._endpoint = ENDPOINTS[record["endpoint"]]
        self._folder = store.folder(record["id"])
        self._writing = asyncio.Lock()

    async def to_its_end(self) -> None:
        source = self._folder / "input.jsonl"
        if self._record["status"] == "validating":
            total, errors = await asyncio.to_thread(check_lines, source, self._record["endpoint"])
            if errors:
                await self._become("failed", errors={"object": "list", "data": errors})
                return
            counts = {"total": total, "completed": 0, "failed": 0}
            await self._become("in_progress", request_counts=counts)
        with closing(await asyncio.to_thread(Journal, self._folder / "journal.jsonl")) as journal:
            await self._compute(source, journal)
            end = self._reason_to_stop() or "completed"
            if self._record["status"] == "in_progress":
                await self._become("finalizing")
            await _to_its_end(self._finish, source, journal, end)

    async def _compute(self, source: Path, journal: Journal) -> None:
        """Every line that is not in the journal, some at once."""
        lines = numbered_lines(source)

        async def work() -> None:
            for _number, raw in lines:
                line = read_line(raw, self._record["endpoint"])
                if line.custom_id in journal.done:
                    continue
                await self._wait_for_rates()
                await self._service.manager.make_way()
                async with self._places:
                    if self._reason_to_stop() is not None:
                        return
                    result, failed = await self._answer(line)
                async with self._writing:
                    await _to_its_end(self._keep, journal, line.custom_id, result, failed)

        if self._record["status"] == "in_progress":
            workers = [asyncio.create_task(work()) for _ in range(LINES_AT_ONCE)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    def _reason_to_stop(self) -> str | None:
        if self._store.cancelled(self._record["id"]) is not None:
            return "cancelled"
        return "expired" if time.time() >= self._record["expires_at"] else None

    async def _wait_for_rates(self) -> None:
        """Until the tenant's key may make a request."""
        while self._reason_to_stop() is None:
            too_fast = self._service.accounting.limits.check_rates(self._tenant)
            if too_fast is None:
                return
            _message, seconds = too_fast
            await asyncio.sleep(min(seconds, RESCAN))

    async def _answer(self, line: Line) -> tuple[bytes, bool]:
        """The line of the output, and whether it goes to the errors."""
        share = f"{self._tenant}/{SHARE}"
        while True:
            try:
                response = await self._endpoint.run(self._service, line.body, self._tenant, share)
                return _output_line(line.custom_id, response.status_code, bytes(response.body)), False
            except CapacityError as error:
                if error.retry_after is None or self._reason_to_stop() is not None:
                    return _error_line(line.custom_id, error), True
                await asyncio.sleep(error.retry_after)
            except PunaError as error:
                return _error_line(line.custom_id, error), True
            except Exception as error:
                _log.exception("%s: %s", self._record["id"], line.custom_id)
                return _error_line(line.custom_id, PunaError(f"the request failed: {type(error).__name__}")), True

    def _keep(self, journal: Journal, custom_id: str, result: bytes, failed: bool) -> None:
        journal.append(custom_id, result, failed)
        # Only for who looks: after a kill, the journal is what counts.
        self._record["request_counts"] |= _counts(journal)
        self._store.records.write(self._tenant, self._record, durable=False)

    async def _become(self, status: str, **changes: Any) -> None:
        self._record |= {"status": status, f"{status}_at": int(time.time()), **changes}
        await _to_its_end(self._store.records.write, self._tenant, self._record)

    def _finish(self, source: Path, journal: Journal, end: str) -> None:
        """Make the files of results, and end. Doing it again after a kill makes the same files again."""
        left: list[bytes] = []
        if end == "expired":
            ids = [read_line(raw, self._record["endpoint"]).custom_id for _number, raw in numbered_lines(source)]
            left = [_expired_line(custom_id) for custom_id in ids if custom_id not in journal.done]
        self._write("output", (line for line, failed in journal.lines() if not failed))
        self._write("error", (line for line, failed in journal.lines() if failed), left)
        counts = {**self._record["request_counts"], **_counts(journal)}
        counts["failed"] += len(left)
        record = {**self._record, "status": end, f"{end}_at": int(time.time()), "request_counts": counts}
        asked = self._store.cancelled(record["id"])
        if asked is not None and end == "cancelled":
            record["cancelling_at"] = asked
        self._store.records.write(self._tenant, record)

    def _write(self, kind: str, lines: Iterator[bytes], more: list[bytes] | None = None) -> None:
        """A file of the tenant's with these lines, if there are any."""
        file_id = self._record["_output" if kind == "output" else "_errors"]
        with self._store.files.create(file_id) as new:
            new.stream.writelines(lines)
            new.stream.writelines(line + b"\n" for line in more or ())
            if new.stream.tell():
                name = f"{self._record['id']}_{kind}.jsonl"
                expires_at = self._record.get("_output_expires_after")
                new.keep(self._tenant, name, "batch_output", expires_at and int(time.time()) + expires_at)
                self._record[f"{kind}_file_id"] = file_id


async def _to_its_end(function: Callable[..., None], *arguments: Any) -> None:
    """Run in a thread, and wait for it also when cancelled: the journal and the lock must outlive it."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        await asyncio.shield(task)
    finally:
        await asyncio.wait({task})


@contextmanager
def _hold(folder: Path) -> Iterator[None]:
    """The batch's lock. Raises _HeldElsewhere when another server has it."""

    def refuse() -> None:
        raise _HeldElsewhere

    with file_lock(folder / "lock", refuse):
        yield


def _counts(journal: Journal) -> dict[str, int]:
    return {"completed": len(journal.done) - journal.failed, "failed": journal.failed}


def _output_line(custom_id: str, status: int, body: bytes) -> bytes:
    head = to_json({"id": new_id("batch_req_"), "custom_id": custom_id})[:-1]
    response = b'{"status_code":%d,"request_id":%s,"body":%s}' % (status, to_json(new_id("req_")), body)
    return head + b',"response":' + response + b',"error":null}'


def _error_line(custom_id: str, error: PunaError) -> bytes:
    return _output_line(custom_id, status_of(error), to_json(error_content("/v1/", error)))


def _expired_line(custom_id: str) -> bytes:
    message = "This request could not be executed before the completion window expired."
    error = {"code": "batch_expired", "message": message}
    return json.dumps({"id": new_id("batch_req_"), "custom_id": custom_id, "response": None, "error": error}).encode()
