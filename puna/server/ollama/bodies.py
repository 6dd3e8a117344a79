"""The bodies of ollama's requests. A field that is not here is refused by name; null is the same as absent."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Literal

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, model_validator

from puna.errors import RequestError

KeepAlive = float | str
Format = Literal["", "json"] | dict[str, Any]
Think = bool | Literal["low", "medium", "high", "max"]


class JsonRoute(APIRoute):
    """Takes every body as JSON: ollama's own examples send it with curl's default type, that of a form."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            others = [(key, value) for key, value in request.scope["headers"] if key != b"content-type"]
            request.scope["headers"] = [*others, (b"content-type", b"application/json")]
            return await handle(Request(request.scope, request.receive))

        return handle_json


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ModelBody(Body):
    """``name`` is what older clients call the model. The ollama command sends both, one of them empty."""

    model: str | None = Field(None, description="The model's name.")
    name: str | None = Field(None, description="The older name of `model`.")

    @model_validator(mode="after")
    def _one_name(self) -> ModelBody:
        if not self.which:
            raise ValueError("model is missing: the model's name")
        return self

    @property
    def which(self) -> str:
        return self.model or self.name or ""


class ModelUse(Body):
    model: str = Field(min_length=1, description="The model's name.")
    options: dict[str, Any] | None = Field(None, description="Sampling and context, by ollama's names.")
    keep_alive: KeepAlive | None = Field(None, description="How long the model stays loaded: `5m`, 0, -1 (for ever).")
    truncate: bool | None = Field(None, description="Drop the oldest part of what is too long; else that is an error.")


class Generation(ModelUse):
    """What /api/generate and /api/chat have in common."""

    format: Format | None = Field(None, description="`json`, or a JSON schema that the answer follows.")
    stream: bool | None = Field(None, description="Answer in pieces, the default.")
    think: Think | None = Field(None, description="Reason before answering; a level means true.")
    shift: bool | None = Field(None, description="Go on when the context is full, without its older half; else end.")
    logprobs: bool | None = Field(None, description="Log probabilities of the answer's tokens.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="And of the most probable tokens beside each.")


class GenerateBody(Generation):
    prompt: str | None = None
    suffix: str | None = Field(None, description="Text after the answer, for models that fill in the middle.")
    system: str | None = Field(None, description="In place of the model's system prompt.")
    template: str | None = Field(None, description="In place of the model's template.")
    context: list[int] | None = Field(None, description="What an earlier answer returned: go on from there.")
    raw: bool | None = Field(None, description="The prompt is the whole text, without a template.")
    images: list[str] | None = Field(None, description="Only empty: these models read text.")


class CalledFunction(Body):
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    description: str | None = None
    index: int | None = None


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatMessage(Body):
    role: str = Field(description="system, user, assistant or tool, in either case.")
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = Field(None, description="Only empty: these models read text.")
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = Field(None, description="Which tool a message of the role `tool` is from.")
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """As puna.chat reads it."""
        if self.images:
            raise no_images()
        calls = [
            {
                **({"id": call.id} if call.id else {}),
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in self.tool_calls or ()
        ]
        raw = {
            "role": self.role.lower(),
            "content": self.content if self.content is not None or calls else "",
            "tool_calls": calls or None,
            "tool_call_id": self.tool_call_id,
            "name": self.tool_name,
            "reasoning_content": self.thinking,
        }
        return {key: value for key, value in raw.items() if value is not None}


class ToolFunction(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: ToolFunction


class ChatBody(Generation):
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None


class EmbedBody(ModelUse):
    input: str | list[str] | None = None
    dimensions: int | None = Field(None, ge=1, description="Keep so many numbers of each vector, scaled to length 1.")


class EmbeddingsBody(ModelUse):
    prompt: str | None = None


class ShowBody(ModelBody):
    verbose: bool | None = Field(None, description="The vocabulary too.")
    # The ollama command sends these, and they change nothing there either.
    system: str | None = None
    template: str | None = None
    options: dict[str, Any] | None = None


class CopyBody(Body):
    source: str = Field(min_length=1)
    destination: str = Field(min_length=1)


class DeleteBody(ModelBody):
    pass


class PullBody(ModelBody):
    insecure: bool | None = Field(None, description="Allow an address without encryption.")
    username: str | None = Field(None, max_length=0, description="Only empty: there is no registry to log in to.")
    password: str | None = Field(None, max_length=0, description="Only empty: there is no registry to log in to.")
    stream: bool | None = None


class PushBody(PullBody):
    pass


class CreateBody(ModelBody):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), populate_by_name=True)

    from_: str | None = Field(None, alias="from", description="The model to begin with.")
    files: dict[str, str] | None = Field(None, description="File names, and the digests of blobs.")
    adapters: dict[str, str] | None = Field(None, description="Adapter files, and the digests of blobs.")
    template: str | None = None
    system: str | None = None
    license: str | list[str] | None = None
    parameters: dict[str, Any] | None = None
    messages: list[ChatMessage] | None = None
    quantize: str | None = Field(None, description="The type to quantize a model of 16 or 32 bits to: `q4_K_M`.")
    renderer: str | None = Field(None, description="Only absent: the template says all.")
    parser: str | None = Field(None, description="Only absent: the template says all.")
    stream: bool | None = None


def no_images() -> RequestError:
    return RequestError("images: this version reads text only; remove them")
