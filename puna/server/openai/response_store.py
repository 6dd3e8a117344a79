"""Responses that are kept: each with the items that were sent for it, so that a conversation can go on from it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from puna.errors import NotFoundError, RequestError
from puna.server.openai.response_input import PlainItem
from puna.server.records import Records, state_errors

KEPT = 30 * 86400  # seconds, as OpenAI keeps them
MAX_TURNS = 10_000


class ResponseStore:
    def __init__(self, home: Path) -> None:
        """``home`` is the store's."""
        self.records = Records(home / "server" / "responses", "response")

    def keep(self, tenant: str, response: dict[str, Any], items: list[PlainItem]) -> None:
        """Durably, with the items of its own input."""
        self.records.write(tenant, {"id": response["id"], "response": response, "input": items})

    def response(self, tenant: str, response_id: str) -> dict[str, Any]:
        """Raises NotFoundError."""
        found: dict[str, Any] = self.records.read(tenant, response_id)["response"]
        return found

    def history(self, tenant: str, response_id: str | None) -> list[PlainItem]:
        """All that was said until a response and by it, the oldest first. Raises NotFoundError, RequestError."""
        turns: list[list[PlainItem]] = []
        wanted = response_id
        while wanted is not None:
            if len(turns) == MAX_TURNS:
                raise RequestError(
                    f"the conversation of {response_id!r} has more than {MAX_TURNS} turns; begin another"
                )
            try:
                record = self.records.read(tenant, wanted)
            except NotFoundError:
                earlier = "" if wanted == response_id else f", which the conversation of {response_id!r} needs"
                raise NotFoundError(f"there is no response {wanted!r}{earlier}") from None
            turns.append([*record["input"], *record["response"]["output"]])
            wanted = record["response"]["previous_response_id"]
        return [item for turn in reversed(turns) for item in turn]

    def input_items(self, tenant: str, response_id: str) -> list[PlainItem]:
        """What was sent for a response, and what its conversation had before, the oldest first."""
        record = self.records.read(tenant, response_id)
        before = self.history(tenant, record["response"]["previous_response_id"])
        return [*before, *record["input"]]

    def clean(self) -> None:
        """Remove what was kept for long enough."""
        self.records.clean()
        folder = self.records.folder
        with state_errors(folder):
            for path in folder.glob("*.json"):
                if time.time() - path.stat().st_mtime > KEPT:
                    path.unlink(missing_ok=True)
