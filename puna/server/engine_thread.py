"""The one thread that computes: it steps the engines of all loaded models in turn, and does nothing else.

Everything else (HTTP, templates, detokenizing) runs in the event loop, beside the native kernels, which release the
GIL. One thread for all models, because two that compute at once would share the same cores and slow each other down.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from puna.engine import Engine, Event, Request, Stream, Timings
from puna.errors import PunaError

Result = TypeVar("Result")
# The place of a request in its group, and what happened to it.
Arrival = tuple[int, Event]


class Answers:
    """Requests that were submitted together, seen from the event loop: their events as they come."""

    def __init__(self, owner: EngineThread, engine: Engine, requests: Sequence[Request]) -> None:
        self.requests = requests
        self._owner = owner
        self._engine = engine
        self._arrivals: asyncio.Queue[Arrival] = asyncio.Queue()
        self._streams: list[Stream] = []
        self._running = set(range(len(requests)))

    @property
    def ended(self) -> bool:
        """Whether the last event of every request was taken."""
        return not self._running

    def timings(self, index: int) -> Timings:
        """A copy of what is known now."""
        return replace(self._streams[index].timings)

    async def next(self) -> list[Arrival]:
        """At least one event, and all that have come."""
        arrivals = [await self._arrivals.get()]
        while not self._arrivals.empty():
            arrivals.append(self._arrivals.get_nowait())
        self._running -= {index for index, event in arrivals if event.finish_reason is not None}
        return arrivals

    def cancel(self, index: int | None = None) -> None:
        """End one request, or all, at the next step; harmless for those that have ended."""
        chosen = self._running & ({index} if index is not None else self._running)
        self._running -= chosen
        if chosen:
            self._owner.post(lambda: self._end(chosen))

    def start(self) -> None:
        """On the engine's thread: queue the requests, all or none. Raises RequestError."""
        try:
            for index, request in enumerate(self.requests):
                stream = self._engine.submit(request)
                self._streams.append(stream)
                self._owner.expect(self._engine, stream.id, self, index)
        except BaseException:
            self._end(self._running)
            raise

    def deliver(self, arrival: Arrival) -> None:
        """In the event loop."""
        self._arrivals.put_nowait(arrival)

    def _end(self, chosen: set[int]) -> None:
        for index, stream in enumerate(self._streams):
            event = self._engine.cancel(stream.id) if index in chosen else None
            if event is not None:
                self._owner.deliver(self._engine, [event])


class EngineThread:
    """Runs engines until ``close``. Made in a running event loop, which gets the events."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._engines: list[Engine] = []
        self._expected: dict[tuple[Engine, int], tuple[Answers, int]] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="puna-engine", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        """Requests that run or wait in any engine."""
        return len(self._expected)

    def post(self, task: Callable[[], None]) -> None:
        """Run ``task`` on the engine's thread between two steps. It must not raise."""
        self._inbox.append(task)
        self._wake.set()

    async def call(self, function: Callable[[], Result]) -> Result:
        """The result of ``function``, run on the engine's thread between two steps. Raises what it raises."""
        future: asyncio.Future[Result] = self._loop.create_future()

        def task() -> None:
            try:
                result = function()
            except BaseException as error:
                self._loop.call_soon_threadsafe(_settle, future, None, error)
            else:
                self._loop.call_soon_threadsafe(_settle, future, result, None)

        self.post(task)
        return await future

    async def submit(self, engine: Engine, requests: Sequence[Request]) -> Answers:
        """Queue requests together, all or none. Raises RequestError."""
        answers = Answers(self, engine, requests)
        try:
            await self.call(answers.start)
        except asyncio.CancelledError:
            answers.cancel()
            raise
        return answers

    def add(self, engine: Engine) -> None:
        """Step this engine too."""
        self.post(lambda: self._engines.append(engine))

    async def remove(self, engine: Engine) -> None:
        """Forget an engine; what still runs there ends as cancelled."""

        def forget() -> None:
            self.deliver(engine, self._cancel_all(engine))
            self._engines.remove(engine)

        await self.call(forget)

    def cancel_all(self) -> None:
        """End what runs in any engine, between two steps."""

        def cancel() -> None:
            for engine in self._engines:
                self.deliver(engine, self._cancel_all(engine))

        self.post(cancel)

    async def close(self) -> None:
        """Cancel all that runs and end the thread."""
        for engine in list(self._engines):
            await self.remove(engine)
        self._closing = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    def expect(self, engine: Engine, request_id: int, answers: Answers, index: int) -> None:
        """On the engine's thread: where the events of a request go."""
        self._expected[engine, request_id] = (answers, index)

    def deliver(self, engine: Engine, events: Sequence[Event]) -> None:
        """On the engine's thread: hand events to the event loop, in one call for all of them."""
        found = []
        for event in events:
            key = (engine, event.request_id)
            answers, index = self._expected[key]
            found.append((answers, (index, event)))
            if event.finish_reason is not None:
                del self._expected[key]
        if found:
            self._loop.call_soon_threadsafe(_hand_over, found)

    def _run(self) -> None:
        while not self._closing:
            if not any(engine.has_work for engine in self._engines):
                self._wake.wait()
            self._wake.clear()
            while self._inbox:
                self._inbox.popleft()()
            for engine in self._engines:
                if engine.has_work:
                    self.deliver(engine, self._step(engine))

    def _step(self, engine: Engine) -> list[Event]:
        try:
            return engine.step()
        except Exception as error:
            # The requests are as they were before the step, and would fail again: their users are told why.
            reason = (
                str(error) if isinstance(error, PunaError) else f"the model failed: {type(error).__name__}: {error}"
            )
            return [event._replace(finish_reason="error", error=reason) for event in self._cancel_all(engine)]

    def _cancel_all(self, engine: Engine) -> list[Event]:
        ids = [request_id for owner, request_id in self._expected if owner is engine]
        return [event for event in map(engine.cancel, ids) if event is not None]


def _hand_over(found: Sequence[tuple[Answers, Arrival]]) -> None:
    for answers, arrival in found:
        answers.deliver(arrival)


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
