"""Removes what the server has kept for long enough."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from puna.errors import PunaError
from puna.server.file_store import FileStore
from puna.server.openai.batch_runner import BatchStore
from puna.server.openai.response_store import ResponseStore

EVERY = 3600.0  # seconds


async def keep_clean(home: Path) -> None:
    """Until cancelled. ``home`` is the store's."""
    while True:
        for clean in (FileStore(home).clean, BatchStore(home).clean, ResponseStore(home).clean):
            try:
                await asyncio.to_thread(clean)
            except PunaError as error:
                logging.getLogger(__name__).error("%s", error)
        await asyncio.sleep(EVERY)
