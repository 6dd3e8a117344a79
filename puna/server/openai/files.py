"""/v1/files: what batches read and write."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from starlette.requests import ClientDisconnect

from puna.server.auth import Tenant
from puna.server.file_store import FileStore
from puna.server.http_errors import FieldError
from puna.server.records import page
from puna.server.sending import CLIENT_CLOSED_REQUEST, json_response
from puna.server.service import TheService
from puna.server.uploads import Upload, receive

router = APIRouter(tags=["OpenAI"])

MAX_FILE = 200 * 10**6  # bytes, as OpenAI bounds the input of a batch
_KNOWN = {"purpose", "expires_after[anchor]", "expires_after[seconds]"}
_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
    },
}
_BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}


@router.post("/v1/files", response_model=None, openapi_extra=_BODY)
async def upload_file(request: Request, service: TheService, tenant: Tenant) -> Response:
    """Keep a file of requests, in JSON Lines, for a batch."""
    with FileStore(service.store.home).create() as new:
        try:
            upload = await receive(request.headers.get("content-type", ""), request.stream(), new.stream, MAX_FILE)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        expires_at = _expiry(upload)
        if upload.filename is None:
            raise FieldError("the form has no file; send one in the field file", "file")
        record = await asyncio.to_thread(new.keep, tenant, upload.filename, "batch", expires_at)
    return json_response(record)


@router.get("/v1/files", response_model=None)
async def list_files(
    service: TheService,
    tenant: Tenant,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    """The files of whoever asks."""
    found = await asyncio.to_thread(FileStore(service.store.home).of, tenant)
    wanted = [record for record in found if purpose is None or record["purpose"] == purpose]
    return json_response(page(wanted if order == "desc" else wanted[::-1], limit, after, "file"))


@router.get("/v1/files/{file_id}", response_model=None)
async def retrieve_file(file_id: str, service: TheService, tenant: Tenant) -> Response:
    """What is known of a file."""
    return json_response(await asyncio.to_thread(FileStore(service.store.home).record, tenant, file_id))


@router.get("/v1/files/{file_id}/content", response_class=FileResponse)
async def file_content(file_id: str, service: TheService, tenant: Tenant) -> FileResponse:
    """A file's bytes."""
    path = await asyncio.to_thread(FileStore(service.store.home).content, tenant, file_id)
    return FileResponse(path, media_type="application/octet-stream")


@router.delete("/v1/files/{file_id}", response_model=None)
async def delete_file(file_id: str, service: TheService, tenant: Tenant) -> Response:
    """Forget a file. A batch that was made of it goes on: it has the content."""
    await asyncio.to_thread(FileStore(service.store.home).delete, tenant, file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})


def _expiry(upload: Upload) -> int | None:
    """When the file expires, in seconds since 1970; checks the form's fields. Raises FieldError."""
    fields = upload.fields
    unknown = sorted(fields.keys() - _KNOWN)
    if unknown:
        raise FieldError(f"the form's field {unknown[0]!r} is not known here; remove it", unknown[0])
    if fields.get("purpose") != "batch":
        raise FieldError(
            f"purpose must be batch, the only use of files here; found {fields.get('purpose')!r}", "purpose"
        )
    seconds = fields.get("expires_after[seconds]")
    if seconds is None:
        return None
    if fields.get("expires_after[anchor]") != "created_at":
        raise FieldError("expires_after[anchor] must be created_at", "expires_after[anchor]")
    if not (seconds.isascii() and seconds.isdigit() and 3600 <= int(seconds[:9]) <= 2592000 and len(seconds) < 9):
        raise FieldError(
            f"expires_after[seconds] must be from 3600 to 2592000, found {seconds!r}", "expires_after[seconds]"
        )
    return int(time.time()) + int(seconds)
