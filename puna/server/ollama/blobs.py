"""/api/blobs/:digest: files that a client sends for /api/create to use."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from puna.errors import RequestError
from puna.server.service import TheService
from puna.store.blobs import Blobs
from puna.store.disk import check_space, disk_errors

router = APIRouter()

_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})", re.IGNORECASE)
_BUFFER = 1 << 20


@router.head("/api/blobs/{digest}", summary="Whether a file is here")
async def has_blob(digest: str, service: TheService) -> Response:
    """200, or 404."""
    return Response(status_code=200 if _is_here(service.store.blobs, sha256_of(digest)) else 404)


@router.post("/api/blobs/{digest}", status_code=201, summary="Send a file", response_class=Response)
async def receive_blob(digest: str, service: TheService, request: Request) -> Response:
    """The body is the file, and must have the digest: otherwise nothing is stored. 201; 200 where it is here already.

    A file that no model uses is deleted after a week.
    """
    sha256, blobs = sha256_of(digest), service.store.blobs
    if _is_here(blobs, sha256):
        async for _ in request.stream():
            pass  # a client that still sends would take an early answer for a broken connection
        return Response(status_code=200)
    part = blobs.partial / f"upload-{secrets.token_hex(16)}.part"
    try:
        found = await _receive(request, part)
        if found != sha256:
            raise RequestError(f"the file has the sha256 {found}, not {sha256} as its address says; nothing was stored")
        with disk_errors(part):
            await asyncio.to_thread(blobs.stage, part, sha256)
    finally:
        part.unlink(missing_ok=True)
    return Response(status_code=201)


async def _receive(request: Request, part: Path) -> str:
    """Write the body to a file; its digest. Raises StoreError when the disk cannot hold it."""
    digest, buffer = hashlib.sha256(), bytearray()
    with disk_errors(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        announced = request.headers.get("content-length", "")
        if announced.isdecimal():
            check_space(part.parent, int(announced), "the file")
        with part.open("wb") as file:

            def write(data: bytes) -> None:
                file.write(data)
                digest.update(data)

            async for chunk in request.stream():
                buffer += chunk
                if len(buffer) >= _BUFFER:
                    await asyncio.to_thread(write, bytes(buffer))
                    buffer.clear()
            write(bytes(buffer))
    return digest.hexdigest()


def sha256_of(digest: str) -> str:
    """The hexadecimal digits of ``sha256:…``. Raises RequestError."""
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise RequestError(f"a digest is sha256: and 64 hexadecimal digits, found {digest[:100]!r}")
    return match[1].lower()


def _is_here(blobs: Blobs, sha256: str) -> bool:
    return any(path.is_file() for path in blobs.places(sha256))
