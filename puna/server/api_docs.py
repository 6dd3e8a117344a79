"""``/docs``: every route with its fields, on one page that loads nothing from anywhere else."""

from __future__ import annotations

import json
from html import escape

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)
_METHODS = ("get", "post", "put", "patch", "delete", "head")


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """The page, made from our own OpenAPI description."""
    description = request.app.openapi()
    routes = [
        f"<details><summary><code>{method.upper()} {escape(path)}</code> {escape(item[method].get('summary', ''))}"
        f"</summary><pre>{escape(json.dumps(item[method], indent=1))}</pre></details>"
        for path, item in description["paths"].items()
        for method in _METHODS
        if method in item
    ]
    schemas = [
        f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary>'
        f"<pre>{escape(json.dumps(schema, indent=1))}</pre></details>"
        for name, schema in description.get("components", {}).get("schemas", {}).items()
    ]
    return HTMLResponse(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Puna\'s APIs</title>'
        '<body style="font-family: sans-serif; max-width: 60em; margin: 2em auto">'
        '<h1>Puna\'s APIs</h1><p>For programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"<h2>Routes</h2>{''.join(routes)}<h2>Schemas</h2>{''.join(schemas)}</body></html>"
    )
