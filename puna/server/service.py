"""What every route shares: the store, the loaded models, the settings. One object, made when the server starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from puna.server.accounting import Accounting
from puna.server.engine_thread import EngineThread
from puna.server.manager import Manager
from puna.server.settings import ServerSettings
from puna.store import Store


@dataclass
class Service:
    settings: ServerSettings
    store: Store
    engine_thread: EngineThread
    manager: Manager
    accounting: Accounting = field(default_factory=Accounting)

    async def close(self) -> None:
        """Unload everything and end the engine's thread."""
        await self.manager.close()
        await self.engine_thread.close()


def service_of(request: Request) -> Service:
    """The service that a request is for."""
    service: Service = request.app.state.service
    return service


# The type of a route's parameter that is filled with the service.
TheService = Annotated[Service, Depends(service_of)]
