"""The body of /v1/responses, as pydantic checks it and as OpenAPI shows it. A field of null is one that is absent."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from puna.server.openai.fields import Body, JsonObjectFormat, TextFormat

_NO_EFFECT = "Accepted without effect."
_REFUSED = "Refused unless null."
Status = Literal["in_progress", "completed", "incomplete"]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class Other(BaseModel):
    """Something else that OpenAI has: known, so that it can be refused by its name."""

    model_config = ConfigDict(extra="allow")

    type: str


class TextPart(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: Any = Field(None, description=_NO_EFFECT)


class RefusalPart(Body):
    type: Literal["refusal"]
    refusal: str


class ReasoningText(Body):
    type: Literal["reasoning_text"]
    text: str


def _by_type(default: str = "Other", **tags: str) -> Discriminator:
    """Which alternative a value is, by its type. Capitals keep the tags out of the paths that errors name."""

    def tag(value: Any) -> str:
        found = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return default if found is None else tags.get(str(found), "Other")

    return Discriminator(tag)


Part = Annotated[
    Annotated[TextPart, Tag("Text")] | Annotated[RefusalPart, Tag("Refusal")] | Annotated[Other, Tag("Other")],
    _by_type(input_text="Text", output_text="Text", text="Text", refusal="Refusal"),
]


class MessageItem(Body):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]
    id: str | None = None
    status: Status | None = None
    phase: str | None = Field(None, description=_NO_EFFECT)


class FunctionCallItem(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None
    namespace: str | None = Field(None, description=_NO_EFFECT)


class FunctionCallOutputItem(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Part]
    id: str | None = None
    status: Status | None = None


class ReasoningItem(Body):
    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] = Field(default=[], description=_NO_EFFECT)
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = Field(None, description="Only its maker could read it: accepted without effect.")
    status: Status | None = None


Item = Annotated[
    Annotated[MessageItem, Tag("Message")]
    | Annotated[FunctionCallItem, Tag("Call")]
    | Annotated[FunctionCallOutputItem, Tag("Output")]
    | Annotated[ReasoningItem, Tag("Reasoning")]
    | Annotated[Other, Tag("Other")],
    _by_type("Message", message="Message", function_call="Call", function_call_output="Output", reasoning="Reasoning"),
]


class FunctionTool(Body):
    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


Tool = Annotated[
    Annotated[FunctionTool, Tag("Function")] | Annotated[Other, Tag("Other")], _by_type(function="Function")
]


class NamedTool(Body):
    type: Literal["function"]
    name: str


class AllowedTools(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


ToolChoice = Annotated[
    Annotated[NamedTool, Tag("Function")] | Annotated[AllowedTools, Tag("Allowed")] | Annotated[Other, Tag("Other")],
    _by_type(function="Function", allowed_tools="Allowed"),
]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(None, description="The schema is enforced in any case.")


class TextOptions(Body):
    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="Medium only.")


class Reasoning(Body):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: str | None = Field(None, description=_NO_EFFECT)
    generate_summary: str | None = Field(None, description=_NO_EFFECT)


class StreamOptions(Body):
    include_obfuscation: bool | None = Field(None, description="Accepted: nothing is obfuscated.")


class ResponseBody(Body):
    """A request for a response."""

    model: str = Field(description="The name of a stored model, or base:adapter.")
    input: str | list[Item] | None = Field(None, description="Text, or the items of a conversation.")
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    include: list[str] | None = Field(None, description="message.output_text.logprobs; others are without effect.")
    metadata: Metadata | None = Field(None, description="Returned with the response.")

    max_tool_calls: int | None = Field(None, description="Accepted: it bounds tools that the server runs; it has none.")
    service_tier: str | None = Field(None, description=_NO_EFFECT)
    user: str | None = Field(None, description=_NO_EFFECT)
    safety_identifier: str | None = Field(None, description=_NO_EFFECT)
    prompt_cache_key: str | None = Field(None, description="Accepted: prefixes are cached without being asked.")
    prompt_cache_retention: str | None = Field(None, description=_NO_EFFECT)
    prompt_cache_options: Any = Field(None, description=_NO_EFFECT)
    background: bool | None = Field(None, description="Refused when true.")
    conversation: Any = Field(None, description=f"{_REFUSED} Use previous_response_id.")
    prompt: Any = Field(None, description=_REFUSED)
    context_management: Any = Field(None, description=f"{_REFUSED} Use truncation.")
    moderation: Any = Field(None, description=_REFUSED)
