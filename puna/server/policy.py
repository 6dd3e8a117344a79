"""What each route is to the server's guards: who may call it, and whether it counts as work for a model."""

from __future__ import annotations

from typing import Literal

# open: no key. read: any key. generate: any key, and counted by the queue and the rates. admin: a key of that scope.
Policy = Literal["open", "read", "generate", "admin"]

# What tells only that the server is here, and the description of its API.
OPEN = {"/", "/livez", "/readyz", "/health", "/docs", "/openapi.json"}
GENERATE = {
    "/api/generate",
    "/api/chat",
    "/api/embed",
    "/api/embeddings",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/moderations",
    "/v1/messages",
}
# They change nothing that others see. Files, batches and responses belong to the key that made them: their routes look.
READ = {"/api/show", "/tokenize", "/detokenize", "/v1/messages/count_tokens"}
OWNED = ("/v1/files/", "/v1/batches/", "/v1/responses/")
# Uploads that go to disk piece by piece, and the most bytes that each may have.
UPLOADS = {"/api/blobs/": 1 << 40, "/v1/files": 513 << 20}
# Any other body is held in memory while it is read.
BODY_LIMIT = 32 << 20


def policy_of(method: str, path: str) -> Policy:
    """A route that nobody thought of here is an admin's, unless it only reads."""
    path = path.rstrip("/") or "/"
    if path in OPEN:
        return "open"
    if method == "POST" and path in GENERATE:
        return "generate"
    renders = path.startswith("/v1/") and path.endswith("/render")
    if path in READ or renders or f"{path}/".startswith(OWNED):
        return "read"
    return "read" if method in ("GET", "HEAD", "OPTIONS") else "admin"


def body_limit(path: str) -> int:
    """The most bytes that the body of a request may have."""
    return next((limit for start, limit in UPLOADS.items() if path.startswith(start)), BODY_LIMIT)
