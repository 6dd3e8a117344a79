"""A model's chat template: from messages to the text of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.exceptions import TemplateError as JinjaError

from puna.chat.messages import Message
from puna.chat.sandbox import METER, Meter, Refused, TemplateEnvironment, size_of
from puna.errors import TemplateError
from puna.tokenizer import Tokenizer

MAX_SOURCE = 1 << 20
_END_OF_CONTENT = "\ue0ff continue here \ue0ff"


class Template(Protocol):
    """What a prompt is rendered with: a Jinja template, or one in Go's language."""

    @property
    def source(self) -> str:
        """The template's text."""

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text. Raises TemplateError."""


class ChatTemplate:
    """A Jinja chat template, compiled once, rendered in a sandbox as transformers renders it.

    ``bos_token`` and ``eos_token`` are the texts of those tokens. Raises TemplateError when the template does not
    compile.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source)} characters, more than {MAX_SOURCE}")
        try:
            self._template = TemplateEnvironment().from_string(source)
        except TemplateSyntaxError as error:
            raise TemplateError(f"the chat template does not compile: line {error.lineno}: {error.message}") from None
        except Exception as error:
            # A hostile source can make Python's own compiler give up in many ways.
            raise TemplateError(f"the chat template does not compile: {_describe(error)}") from None

    @classmethod
    def for_tokenizer(cls, source: str, tokenizer: Tokenizer) -> ChatTemplate:
        """A template with the spelling of a tokenizer's BOS and EOS. Raises TemplateError."""

        def spelled(token: int | None) -> str:
            return "" if token is None else tokenizer.token_bytes(token).decode("utf-8", "replace")

        return cls(source, spelled(tokenizer.bos_id), spelled(tokenizer.eos_id))

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text. ``variables`` are the template's own, such as ``date_string`` or ``enable_thinking``.

        ``continue_final_message`` ends the prompt within the last message, for the model to go on. Raises TemplateError
        when the template rejects the messages, fails, or makes more text than any conversation needs.
        """
        plain = [message.to_dict() if isinstance(message, Message) else dict(message) for message in messages]
        if continue_final_message:
            if add_generation_prompt:
                raise TemplateError("continue_final_message and add_generation_prompt exclude each other")
            plain[-1:] = [with_end_marked(plain[-1])] if plain else []
        given: dict[str, Any] = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            **{name: as_plain(value) for name, value in variables.items()},
            "messages": as_plain(plain),
            "tools": as_plain(tools),
            "documents": as_plain(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        meter = METER.set(Meter(size_of(given, 1 << 30)))
        try:
            text = self._template.render(given)
        except (SecurityError, Refused) as error:
            raise TemplateError(f"the chat template is not run to its end: {error}") from None
        except JinjaError as error:
            raise TemplateError(f"the chat template rejects the conversation: {error}") from None
        except Exception as error:
            raise TemplateError(f"the chat template fails on this conversation: {_describe(error)}") from None
        finally:
            METER.reset(meter)
        return cut_at_end_mark(text) if continue_final_message else text


def as_plain(value: Any) -> Any:
    """Only dictionaries, lists, text and numbers reach a template: nothing with methods of its own."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(item) for item in value]
    raise TemplateError(f"a chat template takes text, numbers, lists and dictionaries, found {type(value).__name__}")


def with_end_marked(message: dict[str, Any]) -> dict[str, Any]:
    """A last message whose end can be found in what is rendered. Raises TemplateError when it has no text."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + _END_OF_CONTENT}
    if isinstance(content, list) and content:
        last = {**content[-1], "text": content[-1].get("text", "") + _END_OF_CONTENT}
        return {**message, "content": [*content[:-1], last]}
    raise TemplateError("continue_final_message needs a last message with text")


def cut_at_end_mark(text: str) -> str:
    """What was rendered, up to the end of the marked message. Raises TemplateError when that is not shown."""
    before, mark, _after = text.rpartition(_END_OF_CONTENT)
    if not mark:
        raise TemplateError("the chat template does not show the last message, so it cannot be continued")
    return before


def _describe(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
