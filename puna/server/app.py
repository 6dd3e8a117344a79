"""The application: the routes of every API over one service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import puna
from puna.ops.protocol import Ops
from puna.server import health
from puna.server.engine_thread import EngineThread
from puna.server.http_errors import install_error_handlers
from puna.server.manager import Manager
from puna.server.ollama import router as ollama_router
from puna.server.service import Service
from puna.server.settings import ServerSettings
from puna.store import Store

ROUTERS = [health.router, ollama_router]


def create_app(settings: ServerSettings, store: Store | None = None, ops: Ops | None = None) -> FastAPI:
    """The ASGI application. ``ops`` defaults to this machine's best."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        thread = EngineThread()
        models = store or Store()
        app.state.service = Service(settings, models, thread, Manager(models, settings, thread, ops))
        try:
            yield
        finally:
            await app.state.service.close()

    app = FastAPI(title="Puna", version=puna.__version__, lifespan=lifespan)
    install_error_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    return app
