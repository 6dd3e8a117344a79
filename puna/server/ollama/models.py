"""The models that are stored and loaded: /api/tags, ps, show, copy, delete; and what says that the server is there."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, PlainTextResponse, Response

import puna
from puna.errors import PunaError, RequestError, StoreError
from puna.server.http_errors import error_body
from puna.server.ollama.bodies import CopyBody, DeleteBody, JsonRoute, ShowBody
from puna.server.ollama.details import details_of, show_model
from puna.server.service import TheService
from puna.store import Manifest, ModelName, Store

# The release of ollama whose API this is: clients compare it with what they need.
API_VERSION = "0.13.0"

router = APIRouter(route_class=JsonRoute)


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def root() -> PlainTextResponse:
    """What clients of ollama look for."""
    return PlainTextResponse("Ollama is running")


@router.head("/api/version", include_in_schema=False)
@router.get("/api/version", summary="The version of the API")
async def version() -> dict[str, str]:
    """`version` is the release of ollama whose API is served, `puna` is this program's."""
    return {"version": API_VERSION, "puna": puna.__version__}


@router.head("/api/tags", include_in_schema=False)
@router.get("/api/tags", summary="The stored models")
async def tags(service: TheService) -> dict[str, Any]:
    """Every stored model. One whose files cannot be read is listed without details."""
    return {"models": await asyncio.to_thread(_stored, service.store)}


def _stored(store: Store) -> list[dict[str, Any]]:
    found = sorted(store.models(), key=lambda manifest: manifest.created, reverse=True)
    return [{**_summary(manifest, store), "modified_at": manifest.created, "size": manifest.size} for manifest in found]


@router.get("/api/ps", summary="The loaded models")
async def ps(service: TheService) -> dict[str, Any]:
    """Every loaded model. `size` is the memory that it may take with its adapters; none is a graphics card's."""
    models = []
    for model in service.manager.loaded():
        summary = await asyncio.to_thread(_summary, model.manifest, service.store)
        own = {
            "size": model.num_bytes,
            "size_vram": 0,
            "expires_at": model.expires_at.isoformat(),
            "context_length": model.llm.context_length,
            "adapters": sorted(model.llm.adapters),
        }
        models.append(summary | own)
    return {"models": models}


def _summary(manifest: Manifest, store: Store) -> dict[str, Any]:
    name = str(manifest.model_name)
    try:
        details = details_of(manifest, store)
    except PunaError as error:
        store.notify(str(error))
        details = {}
    return {"name": name, "model": name, "digest": manifest.content_digest, "details": details}


@router.post("/api/show", summary="What a model is")
async def show(body: ShowBody, service: TheService) -> dict[str, Any]:
    """Shape, template, parameters, licence and capabilities, read from the model's files. For `base:adapter`, the
    base's, which is its `parent_model`."""

    def read() -> dict[str, Any]:
        verbose = bool(body.verbose)
        try:
            return show_model(service.store.find(body.which), service.store, verbose=verbose)
        except StoreError:
            base, adapter = service.manager.adapters.resolve(body.which)
            if adapter is None:
                raise
        shown = show_model(base, service.store, verbose=verbose)
        shown["details"]["parent_model"] = adapter.base
        return shown

    return await asyncio.to_thread(read)


@router.post("/api/copy", summary="Give a model a second name")
async def copy(body: CopyBody, service: TheService) -> Response:
    """No bytes are copied. A name that another model has is refused (409): nothing is replaced in silence."""

    def work() -> Response:
        source = service.store.find(body.source)
        try:
            name = ModelName.parse(body.destination)
        except StoreError as error:
            raise RequestError(f"destination: {error}") from None
        existing = service.store.read(name)
        if existing is not None and existing.content_digest != source.content_digest:
            return JSONResponse(error_body("/api/copy", 409, f"{name} exists already; delete it first"), 409)
        service.store.copy(body.source, body.destination, replace=False)
        return Response()

    return await asyncio.to_thread(work)


@router.delete("/api/delete", summary="Remove a model")
async def delete(body: DeleteBody, service: TheService) -> Response:
    """The model is unloaded as soon as nobody uses it; files that no other model has are deleted."""
    await service.manager.stop(body.which)
    await asyncio.to_thread(service.store.remove, body.which)
    return Response()
