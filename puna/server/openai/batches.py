"""/v1/batches: files of requests, answered when there is time."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from pydantic import Field

from puna.server.auth import Tenant
from puna.server.http_errors import FieldError
from puna.server.openai.batch_lines import ENDPOINTS
from puna.server.openai.batch_runner import BatchRunner, BatchStore
from puna.server.openai.fields import Body
from puna.server.records import new_id, page
from puna.server.sending import json_response
from puna.server.service import TheService

router = APIRouter(tags=["OpenAI"])

WINDOW = 86400  # seconds


def runner_of(request: Request) -> BatchRunner:
    """What runs the server's batches."""
    runner: BatchRunner = request.app.state.batches
    return runner


TheRunner = Annotated[BatchRunner, Depends(runner_of)]
Metadata = dict[str, Annotated[str, Field(max_length=512)]]


class ExpiresAfter(Body):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2592000)]


class BatchBody(Body):
    """A request for a batch."""

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None
    output_expires_after: ExpiresAfter | None = None


@router.post("/v1/batches", response_model=None)
async def create_batch(body: BatchBody, service: TheService, tenant: Tenant, runner: TheRunner) -> Response:
    """Begin to answer the requests of a file."""
    if body.endpoint not in ENDPOINTS:
        known = ", ".join(ENDPOINTS)
        raise FieldError(f"endpoint must be one of {known}, found {body.endpoint!r}", "endpoint")
    now = int(time.time())
    record = {
        "id": new_id("batch_"),
        "object": "batch",
        "endpoint": body.endpoint,
        "input_file_id": body.input_file_id,
        "completion_window": body.completion_window,
        "status": "validating",
        "created_at": now,
        "expires_at": now + WINDOW,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": body.metadata,
    }
    if body.output_expires_after is not None:
        record["_output_expires_after"] = body.output_expires_after.seconds
    shown = await asyncio.to_thread(BatchStore(service.store.home).create, tenant, record)
    runner.wake()
    return json_response(shown)


@router.get("/v1/batches", response_model=None)
async def list_batches(
    service: TheService,
    tenant: Tenant,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: str | None = None,
) -> Response:
    """The batches of whoever asks, the newest first."""
    found = await asyncio.to_thread(BatchStore(service.store.home).of, tenant)
    return json_response(page(found, limit, after, "batch"))


@router.get("/v1/batches/{batch_id}", response_model=None)
async def retrieve_batch(batch_id: str, service: TheService, tenant: Tenant) -> Response:
    """How far a batch has come."""
    return json_response(await asyncio.to_thread(BatchStore(service.store.home).read, tenant, batch_id))


@router.post("/v1/batches/{batch_id}/cancel", response_model=None)
async def cancel_batch(batch_id: str, service: TheService, tenant: Tenant, runner: TheRunner) -> Response:
    """End a batch. What is being computed is finished, and what is done is kept."""
    store = BatchStore(service.store.home)
    record = await asyncio.to_thread(store.read, tenant, batch_id)
    if record["status"] not in ("validating", "in_progress", "cancelling"):
        raise FieldError(f"the batch {batch_id} is {record['status']} and can't be cancelled any more", "batch_id")
    await asyncio.to_thread(store.cancel, batch_id)
    runner.wake()
    return json_response(await asyncio.to_thread(store.read, tenant, batch_id))
