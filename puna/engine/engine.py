"""The engine: many requests share one model, one step at a time."""

from __future__ import annotations

import itertools
import time
from array import array
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Sequence as SequenceOf

from puna.engine.adapters import AdapterTable, LoadedAdapter
from puna.engine.block_pool import BlockPool
from puna.engine.prefix_store import PrefixCache, PrefixStore
from puna.engine.request import Event, Request, Timings
from puna.engine.runner import RunnableModel, Runner
from puna.engine.scheduler import Scheduler, Work
from puna.engine.sequence import Sequence
from puna.engine.speculation import Limits, Speculation, Speculator
from puna.errors import RequestError
from puna.ops.protocol import SamplingRow
from puna.tensor import Adapter


class Engine:
    """Owns the loop: ``submit`` requests, then ``step`` until there is no work.

    Not thread-safe: one thread calls all of its methods (a server gives it a thread of its own, fed by a queue).
    """

    def __init__(
        self,
        model: RunnableModel,
        *,
        num_blocks: int | None = None,
        kv_memory_bytes: int | None = None,
        context_length: int | None = None,
        block_size: int = 32,
        kv_type: str | None = None,
        max_batch_tokens: int = 512,
        max_sequences: int = 64,
        speculation: Speculation | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        """Allocates the cache: ``num_blocks`` blocks of ``block_size`` tokens, or what fits in ``kv_memory_bytes``,
        or else room for one context.

        ``context_length`` (prompt and answer) defaults to the model's, and is never more than the cache holds.
        ``kv_type``: what the cache holds numbers as, see ``Ops.new_kv``. ``speculation`` computes several tokens of an
        answer in one step, where that is faster; they are the same ones. ``prefix_cache`` keeps prefixes on disk.
        Raises RequestError when a number is not possible.
        """
        for name, value in (
            ("num_blocks", num_blocks),
            ("context_length", context_length),
            ("block_size", block_size),
            ("max_batch_tokens", max_batch_tokens),
            ("max_sequences", max_sequences),
        ):
            if value is not None and value < 1:
                raise RequestError(f"{name} must be at least 1, found {value}")
        if max_sequences > max_batch_tokens:
            raise RequestError(f"max_sequences ({max_sequences}) must not exceed max_batch_tokens ({max_batch_tokens})")
        context_length = context_length or model.config.max_position_embeddings
        if num_blocks is None:
            num_blocks = -(-context_length // block_size)
            if kv_memory_bytes is not None:
                block_bytes = model.ops.kv_bytes_per_token(model.config, kv_type) * block_size
                num_blocks = kv_memory_bytes // block_bytes
                if num_blocks < 1:
                    raise RequestError(
                        f"kv_memory_bytes must be at least {block_bytes}, one block of {block_size} tokens, "
                        f"found {kv_memory_bytes}"
                    )
        self.model = model
        self.context_length = min(context_length, num_blocks * block_size)
        kv = model.ops.new_kv(model.config, num_blocks, block_size, kv_type)
        prefixes = None if prefix_cache is None else PrefixStore(prefix_cache, model.config, model.ops, kv)
        self.scheduler = Scheduler(BlockPool(num_blocks, block_size), max_batch_tokens, max_sequences, prefixes)
        max_blocks = self.scheduler.pool.blocks_for(self.context_length)
        self._adapters = AdapterTable(model)
        self._runner = Runner(model, kv, max_batch_tokens, max_sequences, max_blocks)
        self._speculator: Speculator | None = None
        if speculation is not None:
            vocab_size = model.config.vocab_size
            limits = Limits(
                num_blocks, block_size, self.context_length, max_batch_tokens, max_sequences, vocab_size, kv_type
            )
            self._speculator = Speculator(speculation, limits, self.scheduler)
        self._ids = itertools.count()
        self._streams: dict[int, Stream] = {}

    @property
    def has_work(self) -> bool:
        """Whether a request runs or waits."""
        return bool(self._streams)

    def submit(self, request: Request) -> Stream:
        """Queue a request. Raises RequestError when it can never be answered."""
        self._check(request)
        adapter = None if request.adapter is None else self._adapters.find(request.adapter)
        vocab_size = self.model.config.vocab_size
        sequence = Sequence(next(self._ids), request, self.context_length, vocab_size, adapter)
        stream = Stream(self, sequence)
        self._streams[sequence.id] = stream
        self.scheduler.add(sequence)
        return stream

    def step(self) -> list[Event]:
        """Compute one batch: a new token for each request that has caught up, and more where a draft was right.

        Streams receive these events too.

        An exception of the model leaves every request as it was before the step.
        """
        events, works, rows = [], [], []
        for work in self.scheduler.schedule():
            try:
                if work.samples:
                    rows.append(work.sequence.sampling_row())
            except RequestError as error:
                events.append(self.scheduler.finish(work.sequence, "error", str(error)))
            else:
                works.append(work)
        if works:
            events += self._run(works, rows)
        for event in events:
            self._deliver(event)
        return events

    def cancel(self, request_id: int) -> Event | None:
        """End a request now. Returns its last event, or None when it has ended already."""
        stream = self._streams.get(request_id)
        if stream is None:
            return None
        event = self.scheduler.finish(stream.sequence, "cancelled")
        self._deliver(event)
        return event

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """The adapters that requests may name."""
        return self._adapters.by_name

    @property
    def adapted_model(self) -> RunnableModel:
        """The model that knows the loaded adapters by their numbers (Batch.adapters)."""
        return self._adapters.model

    def load_adapter(self, name: str, adapter: Adapter) -> None:
        """Let requests name an adapter of this model. Requests that run are not disturbed.

        Raises RequestError when the name is taken.
        """
        self._adapters.load(name, adapter)
        self._runner.model = self._adapters.model

    def unload_adapter(self, name: str) -> None:
        """Free an adapter. Raises RequestError when there is none of that name, or while requests use it."""
        users = sum(stream.request.adapter == name for stream in self._streams.values())
        if users:
            raise RequestError(f"adapter {name!r} is in use by {users} requests; wait for them or cancel them first")
        self._adapters.unload(name)
        self._runner.model = self._adapters.model

    def check_idle(self) -> None:
        """Assert that nothing is left of requests that have ended: for tests, between two steps without work."""
        assert not self._streams
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert not self.scheduler.waiting.num_tenants
        self.scheduler.pool.check_idle()
        if self._speculator is not None:
            self._speculator.check_idle()

    def _run(self, works: SequenceOf[Work], rows: SequenceOf[SamplingRow]) -> list[Event]:
        if self._speculator is not None:
            works, rows = self._speculator.extend(works, rows)
        scoring = [row for work in works if work.num_scored for row in work.sequence.prompt_rows(work.num_scored)]
        pooled = [work for work in works if work.sequence.pooling is not None]
        others = [work for work in works if work.sequence.pooling is None] if pooled else works
        started = time.perf_counter()
        sampled = self._runner.run(others, [*rows, *scoring]) if others else []
        hidden = self._runner.hidden(pooled) if pooled else []
        seconds = time.perf_counter() - started
        self.scheduler.observe(works, seconds)
        if self._speculator is not None:
            self._speculator.observe(works, seconds)
        scored = sampled[len(rows) :] if scoring else []
        events = self.scheduler.update(works, sampled, scored, hidden)
        if self._speculator is not None:
            for work in works:
                if not work.sequence.num_computed:  # it has shifted, if it has not ended: its tokens are others now
                    self._speculator.release(work.sequence.id)
        return events

    def _deliver(self, event: Event) -> None:
        self._streams[event.request_id].push(event)
        if event.finish_reason is not None:
            del self._streams[event.request_id]
            if self._speculator is not None:
                self._speculator.release(event.request_id)

    def _check(self, request: Request) -> None:
        vocab_size = self.model.config.vocab_size
        params = request.params
        try:
            prompt = array("i", request.prompt_ids)
        except (TypeError, OverflowError):
            raise RequestError("the prompt must be a list of token ids") from None
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token, such as the begin-of-sequence token")
        answers = request.pooling is None and params.max_tokens != 0
        if len(prompt) + answers > self.context_length:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, but the context of {self.context_length} must hold it"
                f"{' and at least one token of answer' if answers else ''}; shorten the prompt or load the model with "
                "a larger context_length"
            )
        _check_ids("the prompt", (min(prompt), max(prompt)), vocab_size)
        _check_ids("logit_bias", params.logit_bias, vocab_size)
        _check_ids("stop_token_ids", params.stop_token_ids, vocab_size)
        _check_ids("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
        for word in params.bad_words_ids:
            _check_ids("bad_words_ids", word, vocab_size)
        if request.shift and request.num_keep > self.context_length - 2:
            raise RequestError(
                f"num_keep must leave two of the context's {self.context_length} tokens, found {request.num_keep}"
            )
        for name, count in (("top_logprobs", params.top_logprobs), ("prompt_logprobs", params.prompt_logprobs or 0)):
            if count > vocab_size:
                raise RequestError(f"{name} must not exceed the vocabulary's {vocab_size} tokens, found {count}")


class Stream:
    """The events of one request. Iterating gives each as it comes, and steps the engine while there is none."""

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self.sequence = sequence
        self._engine = engine
        self._events: deque[Event] = deque()
        self._ended = False

    @property
    def id(self) -> int:
        """The id that events carry and ``Engine.cancel`` takes."""
        return self.sequence.id

    @property
    def request(self) -> Request:
        return self.sequence.request

    @property
    def timings(self) -> Timings:
        """Kept up to date while the request runs."""
        return self.sequence.timings

    def push(self, event: Event) -> None:
        self._events.append(event)
        self._ended = event.finish_reason is not None

    def take(self) -> list[Event]:
        """The events that have come since the last look, without stepping the engine."""
        events = list(self._events)
        self._events.clear()
        return events

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        while not self._events:
            if self._ended:
                raise StopIteration
            self._engine.step()
        return self._events.popleft()


def _check_ids(name: str, ids: Collection[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise RequestError(f"{name} has token id {token}, but the model's ids go from 0 to {vocab_size - 1}")
