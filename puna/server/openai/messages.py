"""Messages, tools and tool choices of chat completions, and how they become Puna's own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from puna.server.http_errors import FieldError
from puna.server.openai.fields import Body

ChoiceWord = Literal["none", "auto", "required"]
FunctionName = Annotated[str, Field(min_length=1, max_length=128)]


_LEFT_OVER = "Accepted without effect: clients send answers back with it."


class ContentPart(Body):
    """Text. Other kinds are known so that they can be refused by name: these models read text only."""

    type: Literal["text", "refusal", "image_url", "input_audio", "video_url", "file"]
    text: str | None = None
    refusal: str | None = None
    image_url: Any = None
    input_audio: Any = None
    video_url: Any = None
    file: Any = None
    prompt_cache_breakpoint: Any = Field(None, description="Accepted: prefixes are cached without being asked.")


class FunctionCall(Body):
    name: str
    arguments: str | dict[str, Any]
    parsed_arguments: Any = Field(None, description=_LEFT_OVER)


class ToolCall(Body):
    id: str | None = None
    type: Literal["function", "custom"] = "function"
    function: FunctionCall | None = None
    custom: Any = None
    index: int | None = Field(None, description="Accepted: the place in the list counts.")
    provider_specific_fields: Any = Field(None, description=_LEFT_OVER)


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = Field(None, description="Stands in for the content where there is none.")
    audio: Any = Field(None, description="Refused unless null.")
    function_call: Any = Field(None, description="Refused unless null; use tool_calls.")
    reasoning: str | None = Field(None, description="Another name of reasoning_content.")
    # What clients leave in an answer that they send back.
    annotations: list[Any] | None = Field(None, description=_LEFT_OVER)
    parsed: Any = Field(None, description=_LEFT_OVER)
    provider_specific_fields: Any = Field(None, description=_LEFT_OVER)


class Function(Body):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function", "custom"]
    function: Function | None = None
    custom: Any = Field(None, description="Refused; use a function.")


class FunctionChoice(Body):
    name: FunctionName


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: list[dict[str, Any]]


class ToolChoice(Body):
    type: Literal["function", "allowed_tools", "custom"]
    function: FunctionChoice | None = None
    allowed_tools: AllowedTools | None = None
    custom: Any = Field(None, description="Refused; use a function.")


def plain_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages for puna.chat. Raises FieldError for what a text model can't read."""
    return [_plain_message(message, f"messages.{i}") for i, message in enumerate(messages)]


def plain_tools(tools: list[Tool] | None, choice: ChoiceWord | ToolChoice | None) -> tuple[list[dict[str, Any]], str]:
    """The tools that may be called, and ChatAsk's tool_choice. Raises FieldError."""
    plain = [_plain_tool(tool, f"tools.{i}") for i, tool in enumerate(tools or [])]
    names = [tool["function"]["name"] for tool in plain]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise FieldError(f"tools has two functions named {repeated!r}; names must differ", "tools")
    wanted = choice or "auto"
    if isinstance(wanted, str):
        if wanted == "required" and not plain:
            raise FieldError("tool_choice is required, but there are no tools to choose from", "tool_choice")
        return plain, wanted
    if wanted.type == "function" and wanted.function is not None:
        return plain, _known(wanted.function.name, names)
    if wanted.type == "allowed_tools" and wanted.allowed_tools is not None:
        allowed = {_known(_name_of(tool), names) for tool in wanted.allowed_tools.tools}
        if not allowed:
            raise FieldError("tool_choice.allowed_tools.tools is empty; name at least one", "tool_choice")
        return [tool for tool in plain if tool["function"]["name"] in allowed], wanted.allowed_tools.mode
    raise FieldError("tool_choice must name a function, or the functions that are allowed", "tool_choice")


def _plain_message(message: ChatMessage, where: str) -> dict[str, Any]:
    if message.role == "function" or message.function_call is not None:
        raise FieldError(f"{where}: function calls of the old kind are not supported; use tools", where)
    if message.audio is not None:
        raise FieldError(f"{where}.audio can't be read: this model takes text only", f"{where}.audio")
    content: Any = message.content
    if isinstance(content, list):
        content = [{"type": "text", "text": _text_of(part, f"{where}.content.{i}")} for i, part in enumerate(content)]
    if content is None and not message.tool_calls:
        content = message.refusal
    plain: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        plain["tool_calls"] = [
            _plain_call(call, f"{where}.tool_calls.{i}") for i, call in enumerate(message.tool_calls)
        ]
    if message.reasoning is not None:
        plain["reasoning_content"] = message.reasoning
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            plain[name] = getattr(message, name)
    return plain


def _text_of(part: ContentPart, where: str) -> str:
    if part.type not in ("text", "refusal"):
        raise FieldError(f"{where}: a part of type {part.type} can't be read: this model takes text only", where)
    text = part.text if part.type == "text" else part.refusal
    if text is None:
        raise FieldError(f"{where}.{part.type} is missing", f"{where}.{part.type}")
    return text


def _plain_call(call: ToolCall, where: str) -> dict[str, Any]:
    if call.function is None:
        raise FieldError(f"{where}.function is missing; only function calls are supported", where)
    plain: dict[str, Any] = {
        "type": "function",
        "function": {"name": call.function.name, "arguments": call.function.arguments},
    }
    return plain if call.id is None else {"id": call.id, **plain}


def _plain_tool(tool: Tool, where: str) -> dict[str, Any]:
    if tool.function is None or tool.type == "custom":
        raise FieldError(f"{where} must be a function; custom tools are not supported", where)
    return {"type": "function", "function": tool.function.model_dump(exclude_none=True)}


def _name_of(tool: dict[str, Any]) -> str:
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""


def _known(name: str, names: list[str]) -> str:
    if name not in names:
        raise FieldError(f"tool_choice names {name!r}, which is not among the tools", "tool_choice")
    return name
