"""Many models on one machine: loaded when asked for, kept for a while, evicted when others need the memory."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone

import psutil

from puna.checkpoint import open_checkpoint
from puna.checkpoint.lora import read_adapter
from puna.errors import CapacityError
from puna.llm import LLM
from puna.llm.memory import CACHED_CONTEXTS, DEFAULT_CONTEXT, MemoryEstimate, estimate_memory
from puna.llm.ollama_options import parse_options
from puna.ops.protocol import Ops
from puna.ops.registry import make_ops
from puna.server.accounting import Accounting
from puna.server.adapters import Adapters, ServedAdapter
from puna.server.engine_thread import EngineThread
from puna.server.settings import ServerSettings
from puna.store import Manifest, ResolvedModel, Store, resolve_stored

FREE_SHARE = 0.9  # of the memory that is free at the start; the rest is the system's
RETRY_SECONDS = 5.0  # for who asks for an adapter that has no room now


@dataclass(eq=False)
class ServedModel:
    """A loaded model. ``leases`` counts the requests that use it; ``expires`` is on the clock of ``time.monotonic``.

    Who asked for an ``adapter`` has a copy of its own, with the adapter's name in the engine.
    """

    name: str
    manifest: Manifest
    llm: LLM
    engine_thread: EngineThread
    accounting: Accounting
    memory: MemoryEstimate
    load_seconds: float
    leases: int = 0
    last_used: float = field(default_factory=time.monotonic)
    expires: float = math.inf
    stopping: bool = False
    adapter: str | None = None

    @property
    def expires_at(self) -> datetime:
        """When it is unloaded if nobody asks for it before; far away for one that stays."""
        seconds = min(self.expires - time.monotonic(), 100 * 365 * 86400.0)
        return datetime.now(timezone.utc) + timedelta(seconds=max(0.0, seconds))

    @property
    def num_bytes(self) -> int:
        """Memory that it may take, with the adapters that are loaded."""
        return self.memory.total + sum(adapter.nbytes for adapter in self.llm.engine.adapters.values())


class Manager:
    """Owns the loaded models. All of it runs in the event loop; loading itself in a worker thread."""

    def __init__(
        self,
        store: Store,
        settings: ServerSettings,
        engine_thread: EngineThread,
        ops: Ops | None = None,
        accounting: Accounting | None = None,
    ) -> None:
        self.store = store
        self.settings = settings
        self.ops = make_ops(None, settings.threads) if ops is None else ops
        self.budget = settings.memory_budget or int(psutil.virtual_memory().available * FREE_SHARE)
        self._engine_thread = engine_thread
        self._accounting = accounting or Accounting()
        self._models: dict[str, ServedModel] = {}
        self.adapters = Adapters(store, settings.adapter_dir)
        self._loading = asyncio.Lock()
        self._adapting = asyncio.Lock()
        self._released = asyncio.Event()
        self._blocked: dict[object, str | None] = {}  # loads that wait: for this model to be free, or for room
        self._unblocked = asyncio.Event()
        self._unblocked.set()
        self._alarm: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[bool]] = set()
        self._unloading: set[asyncio.Task[None]] = set()

    def loaded(self) -> list[ServedModel]:
        """The models in memory, the one used last first."""
        return sorted(self._models.values(), key=lambda model: -model.last_used)

    @property
    def blocked(self) -> bool:
        """Whether a load waits for models in use."""
        return bool(self._blocked)

    @asynccontextmanager
    async def use(
        self, name: str, *, keep_alive: float | None = None, context_length: int | None = None
    ) -> AsyncIterator[ServedModel]:
        """A model for as long as the block lasts, loaded if need be, and for ``keep_alive`` seconds after it.

        ``name`` is a stored model's, or ``base:adapter``. ``context_length`` is what it must hold at least. Raises
        StoreError for an unknown name, CapacityError when it cannot be in memory, and what loading raises.

        Must not be nested. While a load waits for models in use to end, who comes later for one of those waits behind
        it: otherwise a model that is always busy would keep all others out.
        """
        manifest, adapter = await asyncio.to_thread(self.adapters.resolve, name)
        if any(in_the_way in (None, _key(manifest)) for in_the_way in self._blocked.values()):
            await self._unblocked.wait()
        model = await self._acquire(manifest, context_length)
        try:
            yield model if adapter is None else await self._with_adapter(model, adapter)
        finally:
            self._release(model, self.settings.keep_alive if keep_alive is None else keep_alive)

    async def stop(self, name: str) -> bool:
        """Unload a model now, or as soon as nobody uses it; whether it was loaded. Raises StoreError."""
        model = self._models.get(str(self.store.locate(name)))
        if model is None:
            return False
        model.stopping = True
        self._unload_expired()
        await asyncio.gather(*self._unloading)
        return True

    async def add_adapter(self, adapter: ServedAdapter) -> None:
        """Load an adapter, and its model if need be. Raises CheckpointError when it is none of this model, and what
        ``use`` raises."""
        self.adapters.add(adapter)
        try:
            async with self.use(adapter.model):
                pass
        except BaseException:
            self.adapters.remove(adapter)
            raise

    async def remove_adapter(self, adapter: ServedAdapter) -> None:
        """Forget an adapter. Raises RequestError while an answer uses it."""
        model = self._models.get(adapter.base)
        if model is not None and adapter.name in model.llm.adapters:
            engine = model.llm.engine
            await self._engine_thread.call(lambda: engine.unload_adapter(adapter.name))
        self.adapters.remove(adapter)

    async def close(self) -> None:
        """Unload everything, in use or not."""
        if self._alarm is not None:
            self._alarm.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for model in list(self._models.values()):
            await self._unload(model)

    async def _acquire(self, manifest: Manifest, context_length: int | None) -> ServedModel:
        context_length = context_length or parse_options(manifest.parameters).num_ctx
        token = object()
        try:
            while True:
                model = self._models.get(_key(manifest))
                if model is not None and _serves(model, manifest, context_length):
                    model.leases += 1
                    model.last_used = time.monotonic()
                    return model
                # A client that goes away must not leave a load behind that nobody owns.
                released = self._released
                task = asyncio.create_task(self._load(manifest, context_length))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                if not await asyncio.shield(task):
                    self._blocked[token] = _key(manifest) if _key(manifest) in self._models else None
                    self._unblocked.clear()
                    await released.wait()
        finally:
            self._blocked.pop(token, None)
            if not self._blocked:
                self._unblocked.set()

    async def _with_adapter(self, model: ServedModel, adapter: ServedAdapter) -> ServedModel:
        """The model as it is asked for with an adapter, which is loaded if need be."""
        llm = model.llm
        async with self._adapting:
            if adapter.name not in llm.adapters:
                found = await asyncio.to_thread(read_adapter, adapter.path, llm.config)
                async with self._loading:
                    if not await self._make_room(found.nbytes, model):
                        raise CapacityError(
                            f"there is no room for the adapter {adapter.model} beside the models in use; try later",
                            RETRY_SECONDS,
                        )
                    await self._engine_thread.call(lambda: llm.engine.load_adapter(adapter.name, found))
        return replace(model, adapter=adapter.name)

    async def _load(self, manifest: Manifest, context_length: int | None) -> bool:
        """Load in place of idle models; False when those in use must end first."""
        async with self._loading:
            loaded = self._models.get(_key(manifest))
            if loaded is not None:
                if _serves(loaded, manifest, context_length):
                    return True
                if loaded.leases:
                    return False
                await self._unload(loaded)
            found = await asyncio.to_thread(resolve_stored, manifest, self.store)
            context = await asyncio.to_thread(self._context, found, manifest, context_length)
            memory = await asyncio.to_thread(self._estimate, found, context)
            self._check_size(_key(manifest), memory)
            if not await self._make_room(memory.total):
                return False
            started = time.perf_counter()
            llm = await asyncio.to_thread(self._load_llm, found, context)
            seconds = time.perf_counter() - started
            model = ServedModel(_key(manifest), manifest, llm, self._engine_thread, self._accounting, memory, seconds)
            model.expires = time.monotonic() + self.settings.keep_alive
            self._models[model.name] = model
            self._engine_thread.add(llm.engine)
            return True

    def _load_llm(self, found: ResolvedModel, context: int | None) -> LLM:
        settings = self.settings
        return LLM.load(
            found,
            context_length=context,
            ops=self.ops,
            kv_type=settings.kv_type,
            max_sequences=settings.parallel,
            adapters=False,  # each when it is asked for, where there is room
        )

    def _context(self, found: ResolvedModel, manifest: Manifest, wanted: int | None) -> int | None:
        """What to load with: at most what the model was made for, at least what who asks for nothing gets.

        Otherwise the small wish of one client would be the limit of all others.
        """
        if wanted is None and self.settings.context_length is None:
            return None
        usual = parse_options(manifest.parameters).num_ctx or self.settings.context_length or DEFAULT_CONTEXT
        longest = open_checkpoint(found.path).config.max_position_embeddings
        return min(max(wanted or 0, usual), longest)

    def _estimate(self, found: ResolvedModel, context: int | None) -> MemoryEstimate:
        return estimate_memory(self.ops, found, context or DEFAULT_CONTEXT, self.settings.kv_type, CACHED_CONTEXTS)

    def _check_size(self, name: str, memory: MemoryEstimate) -> None:
        """Raises CapacityError for a model that could not be loaded into the whole budget."""
        if memory.weights + memory.overhead > self.budget:
            raise CapacityError(
                f"{name} needs {_gigabytes(memory.weights + memory.overhead)} of memory for its weights, more than the "
                f"{_gigabytes(self.budget)} that models may use; choose a smaller or more strongly quantized model"
            )

    async def _make_room(self, num_bytes: int, owner: ServedModel | None = None) -> bool:
        """Unload idle models, the least recently used first, until there is room; False when those in use bar the way.

        For another model, or for more of ``owner``, which is in use. One that is alone may exceed the budget: its cache
        is made smaller where memory is short.
        """
        while True:
            used = sum(model.num_bytes for model in self._models.values())
            alone = not self._models or list(self._models.values()) == [owner]
            has_place = owner is not None or len(self._models) < self.settings.max_loaded
            if has_place and (alone or used + num_bytes <= self.budget):
                return True
            idle = [model for model in self._models.values() if not model.leases]
            if not idle:
                return False
            await self._unload(min(idle, key=lambda model: model.last_used))

    def _release(self, model: ServedModel, keep_alive: float) -> None:
        model.leases -= 1
        model.last_used = time.monotonic()
        model.expires = model.last_used + keep_alive
        self._tell_released()
        self._unload_expired()

    def _unload_expired(self) -> None:
        """Unload idle models whose time is over, and come back when the next one's is."""
        now = time.monotonic()
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        idle = [model for model in self._models.values() if not model.leases]
        for model in idle:
            if model.stopping or model.expires <= now:
                task = asyncio.get_running_loop().create_task(self._unload(model))
                self._unloading.add(task)
                task.add_done_callback(self._unloading.discard)
        waiting = [model.expires for model in idle if now < model.expires < math.inf]
        if waiting:
            loop = asyncio.get_running_loop()
            self._alarm = loop.call_later(min(waiting) - now, self._unload_expired)

    async def _unload(self, model: ServedModel) -> None:
        if self._models.get(model.name) is not model:
            return
        del self._models[model.name]
        await self._engine_thread.remove(model.llm.engine)
        model.llm.close()
        self._tell_released()

    def _tell_released(self) -> None:
        self._released.set()
        self._released = asyncio.Event()


def _key(manifest: Manifest) -> str:
    return str(manifest.model_name)


def _serves(model: ServedModel, manifest: Manifest, context_length: int | None) -> bool:
    """Whether the loaded model is the stored one as it is now, with a context that is long enough."""
    longest = model.llm.config.max_position_embeddings
    long_enough = context_length is None or model.llm.context_length >= min(context_length, longest)
    return model.manifest == manifest and not model.stopping and long_enough


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
