"""/v1/models: what is in the store."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from puna.server.adapters import ServedAdapter
from puna.server.sending import json_response
from puna.server.service import TheService
from puna.store import Manifest

router = APIRouter(tags=["OpenAI"])


def model_json(manifest: Manifest) -> dict[str, Any]:
    """A model as the API shows it; ``owned_by`` is the part of its name before the slash."""
    owner, slash, _name = manifest.name.rpartition("/")
    return {
        "id": str(manifest.model_name),
        "object": "model",
        "created": _unix_time(manifest.created),
        "owned_by": owner if slash else "library",
    }


def adapter_json(manifest: Manifest, adapter: ServedAdapter) -> dict[str, Any]:
    """An adapter as the API shows it, with vLLM's word for its base."""
    return {**model_json(manifest), "id": adapter.model, "parent": adapter.base}


@router.get("/v1/models", response_model=None)
async def list_models(service: TheService) -> Response:
    """Every model in the store, and every adapter that was loaded."""
    manifests = await asyncio.to_thread(service.store.models)
    listed = [model_json(manifest) for manifest in manifests]
    by_name = {str(manifest.model_name): manifest for manifest in manifests}
    for adapter in service.manager.adapters.added():
        if adapter.base in by_name:
            listed.append(adapter_json(by_name[adapter.base], adapter))
    return json_response({"object": "list", "data": listed})


@router.get("/v1/models/{model:path}", response_model=None)
async def retrieve_model(model: str, service: TheService) -> Response:
    """One model, by any of its names."""
    added = service.manager.adapters.added()
    adapter = next((found for found in added if model in (found.model, f"{found.base}:{found.name}")), None)
    manifest = await asyncio.to_thread(service.store.find, model if adapter is None else adapter.base)
    return json_response(model_json(manifest) if adapter is None else adapter_json(manifest, adapter))


def _unix_time(created: str) -> int:
    """Seconds since 1970 of a manifest's date; 0 for one that a hand has made unreadable."""
    try:
        return int(datetime.fromisoformat(created.replace("Z", "+00:00")).timestamp())
    except ValueError:
        return 0
