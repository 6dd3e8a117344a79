"""The bodies of requests: every field that is known, with what is accepted and has no meaning here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# Where a prompt may be cached. Here every prompt is, and without a price.
CacheControl = dict[str, Any] | None


class Fields(BaseModel):
    """A JSON object in which an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextBlock(Fields):
    type: Literal["text"]
    text: str
    cache_control: CacheControl = None
    citations: list[Any] | None = None


class ThinkingBlock(Fields):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Fields):
    """Made by Anthropic for its own models; no other can read it."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Fields):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl = None
    caller: dict[str, Any] | None = None


class UnsupportedBlock(BaseModel):
    """Known, so that it can be refused in a sentence."""

    model_config = ConfigDict(extra="allow")

    type: Literal["image", "document", "search_result"]


def _as_blocks(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


ResultBlock = Annotated[TextBlock | UnsupportedBlock, Field(discriminator="type")]
ResultContent = Annotated[
    list[ResultBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[ResultBlock])
]


class ToolResultBlock(Fields):
    type: Literal["tool_result"]
    tool_use_id: str
    content: ResultContent = []
    is_error: bool | None = None
    cache_control: CacheControl = None


Block = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock | UnsupportedBlock,
    Field(discriminator="type"),
]
Content = Annotated[list[Block], BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block])]
SystemText = Annotated[list[TextBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock])]


class InputMessage(Fields):
    role: Literal["user", "assistant", "system"]
    content: Content


class Tool(Fields):
    """A tool that the client runs. ``type`` of another value names one that Anthropic runs."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool | None = None
    cache_control: CacheControl = None
    input_examples: list[dict[str, Any]] | None = None
    eager_input_streaming: bool | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    defer_loading: Literal[False] = False


class ToolChoice(Fields):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Fields):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(default=None, ge=1)
    display: Literal["summarized"] | None = None


class OutputFormat(Fields):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Fields):
    format: OutputFormat | None = None
    effort: str | None = None


class Metadata(Fields):
    user_id: str | None = None


class CountRequest(Fields):
    """The body of /v1/messages/count_tokens: what a prompt is made of."""

    model: str
    messages: list[InputMessage] = Field(min_length=1)
    system: SystemText = []
    tools: list[Tool] = []
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl = None


class MessagesRequest(CountRequest):
    """The body of /v1/messages."""

    max_tokens: int = Field(ge=1)
    stream: bool = False
    stop_sequences: list[str] | None = None
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
