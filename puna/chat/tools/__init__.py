"""Tool calls: what a model is told of tools, and how calls are read from what it writes. See docs/tool-calls.md."""

from puna.chat.tools.conversation import ToolConversation, tool_conversation
from puna.chat.tools.deltas import Delta, TextDelta, ToolCall, ToolCallArguments, ToolCallStart, collect
from puna.chat.tools.formats import ToolFormat, tool_format
from puna.chat.tools.grammar import tool_grammar
from puna.chat.tools.stream import ToolCallStream, new_call_id
from puna.chat.tools.thinking import ThinkingDelta, ThinkingStream
from puna.chat.tools.tool import (
    Tool,
    ToolChoice,
    check_tool_choice,
    check_tools,
    from_anthropic,
    from_ollama,
)

__all__ = [
    "Delta",
    "TextDelta",
    "ThinkingDelta",
    "ThinkingStream",
    "Tool",
    "ToolCall",
    "ToolCallArguments",
    "ToolCallStart",
    "ToolCallStream",
    "ToolChoice",
    "ToolConversation",
    "ToolFormat",
    "check_tool_choice",
    "check_tools",
    "collect",
    "from_anthropic",
    "from_ollama",
    "new_call_id",
    "tool_conversation",
    "tool_format",
    "tool_grammar",
]
