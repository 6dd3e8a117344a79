"""The application: the routes of every API over one service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import puna
from puna.ops.protocol import Ops
from puna.server import anthropic, api_docs, health, openai
from puna.server.accounting import Accounting
from puna.server.auth import Auth
from puna.server.cors import Origins, is_loopback
from puna.server.engine_thread import EngineThread
from puna.server.gauges import ModelGauges
from puna.server.housekeeping import keep_clean
from puna.server.http_errors import install_error_handlers
from puna.server.keys import KeyFile, Keys
from puna.server.limits import LimitRequests, Limits
from puna.server.logs import RequestLog
from puna.server.manager import Manager
from puna.server.ollama import router as ollama_router
from puna.server.openai.batch_runner import BatchRunner
from puna.server.service import Service
from puna.server.settings import ServerSettings
from puna.store import Store

ROUTERS = [health.router, api_docs.router, ollama_router, openai.router, anthropic.router]


def create_app(settings: ServerSettings, store: Store | None = None, ops: Ops | None = None) -> FastAPI:
    """The ASGI application. ``ops`` defaults to this machine's best. Raises StoreError when the keys can't be read."""
    models = store or Store()
    keys = Keys(settings.api_keys, KeyFile(models))
    accounting = Accounting(limits=Limits(keys, settings.parallel + settings.max_queue))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        thread = EngineThread()
        manager = Manager(models, settings, thread, ops, accounting)
        service = app.state.service = Service(settings, models, thread, manager, accounting)
        batches = app.state.batches = BatchRunner(service)
        cleaning = asyncio.create_task(keep_clean(models.home))
        try:
            yield
        finally:
            cleaning.cancel()
            await batches.close()
            await service.close()

    app = FastAPI(title="Puna", version=puna.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    accounting.metrics.registry.register(ModelGauges(app))
    install_error_handlers(app)
    # Each wraps those before it: the log comes first, and sees what the others refuse.
    app.add_middleware(LimitRequests, limits=accounting.limits)
    app.add_middleware(Auth, keys=keys)
    app.add_middleware(Origins, origins=settings.origins, local=is_loopback(settings.host), keys=keys)
    app.add_middleware(RequestLog, metrics=accounting.metrics, with_bodies=settings.log_requests)
    for router in ROUTERS:
        app.include_router(router)
    return app
