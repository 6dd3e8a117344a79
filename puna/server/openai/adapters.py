"""vLLM's /v1/load_lora_adapter and /v1/unload_lora_adapter. Only an admin's key may call them."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from pydantic import Field

from puna.errors import CheckpointError
from puna.server.http_errors import FieldError
from puna.server.openai.fields import Body, Text
from puna.server.service import Service, TheService

router = APIRouter(tags=["Adapters"])


class LoadAdapterBody(Body):
    """An adapter to load; requests then name the model ``base_model:lora_name``."""

    lora_name: Text = Field(description="The adapter's name, or base:adapter.")
    lora_path: Text = Field(description="A PEFT folder or GGUF file in the server's --adapter-dir.")
    base_model: Text | None = Field(None, description="May be left out where one model is loaded.")


class UnloadAdapterBody(Body):
    lora_name: Text = Field(description="The adapter's name, or base:adapter.")
    lora_int_id: int | None = Field(None, description="Accepted without effect.")


@router.post("/v1/load_lora_adapter", response_model=None)
async def load_lora_adapter(body: LoadAdapterBody, service: TheService) -> Response:
    """Load a LoRA adapter."""
    base, _, name = body.lora_name.rpartition(":")
    base = base or body.base_model or _only_model(service)
    adapter = await asyncio.to_thread(service.manager.adapters.make, base, name, body.lora_path)
    try:
        await service.manager.add_adapter(adapter)
    except CheckpointError as error:
        raise FieldError(str(error), "lora_path") from None
    return PlainTextResponse(f"Success: LoRA adapter '{adapter.model}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_model=None)
async def unload_lora_adapter(body: UnloadAdapterBody, service: TheService) -> Response:
    """Forget a LoRA adapter."""
    adapter = await asyncio.to_thread(service.manager.adapters.find, body.lora_name)
    await service.manager.remove_adapter(adapter)
    return PlainTextResponse(f"Success: LoRA adapter '{adapter.model}' removed successfully.")


def _only_model(service: Service) -> str:
    loaded = service.manager.loaded()
    if len(loaded) != 1:
        raise FieldError(f"{len(loaded)} models are loaded; say in base_model which one this is for", "base_model")
    return loaded[0].name
