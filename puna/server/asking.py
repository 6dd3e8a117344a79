"""What any API asks of a model, in Puna's own terms, and how it becomes requests of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from puna.chat.go_template import GoTemplate, chat_template
from puna.chat.messages import Message
from puna.chat.prompt import Prompt, render_prompt
from puna.chat.template import Template
from puna.chat.tools import (
    ToolChoice,
    ToolConversation,
    ToolFormat,
    check_tools,
    tool_conversation,
    tool_format,
    tool_grammar,
)
from puna.engine import Constraint, Request, SamplingParams
from puna.errors import ContextError, RequestError
from puna.server.manager import ServedModel
from puna.server.pieces import Pieces, PlainReader
from puna.server.reading import reader_of
from puna.tokenizer import Tokenizer

LONGEST_SHIFTED = 10  # contexts; without an end, a model that never stops would go on for ever


@dataclass(frozen=True)
class Ask:
    """What every kind of generation has. ``n`` answers are made of one prompt, with seeds that follow each other.

    ``context_length`` is a bound below the loaded model's. Of a prompt, only the ``last_tokens`` count, if given. One
    that is too long is an error unless ``truncate`` says to drop its oldest part. With ``shift``, an answer that fills
    the model's context goes on, without the older half of what follows the first ``num_keep`` tokens; ten contexts
    are the end where nothing else is. ``tenant`` is whom the request is for: its cached prefixes are its own.
    """

    sampling: SamplingParams
    n: int = 1
    constraint: Constraint | None = None
    context_length: int | None = None
    truncate: bool = False
    last_tokens: int | None = None
    shift: bool = False
    num_keep: int = 0
    tenant: str = ""


@dataclass(frozen=True)
class ChatAsk(Ask):
    """A conversation to answer. ``tool_choice``: ``auto``, ``none``, ``required``, or the name of a tool.

    ``template`` (Jinja, or Go's language) replaces the model's; ``template_variables`` are handed to it. With
    ``continue_final_message`` the model goes on with the last message instead of beginning one.
    """

    messages: Sequence[Message | Mapping[str, Any]] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    think: bool | None = None
    template: str | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False


def chat_prompt(model: ServedModel, ask: ChatAsk) -> Prompt:
    """The exact prompt of a conversation. Raises RequestError, TemplateError; an overlong one is cut or refused."""
    return _Chat(model, ask).prompt


def chat_pieces(model: ServedModel, ask: ChatAsk) -> tuple[Prompt, Pieces]:
    """The prompt of a conversation, and its answers to iterate over. Raises RequestError, TemplateError.

    Takes milliseconds, more where a grammar is made: not for the event loop.
    """
    chat = _Chat(model, ask)
    reader, visible = reader_of(chat.template, model.llm.tokenizer, chat.prompt, chat.tool_format, chat.tools)
    asked = replace(ask, constraint=chat.constraint)
    return chat.prompt, Pieces(model, _requests(model, asked, chat.prompt.ids), reader, visible)


class _Chat:
    """A conversation on its way to a prompt, and what its tools ask for. Raises RequestError, TemplateError."""

    def __init__(self, model: ServedModel, ask: ChatAsk) -> None:
        llm = model.llm
        self.template = llm.template if ask.template is None else chat_template(ask.template, llm.tokenizer)
        self.tools = [] if ask.tool_choice == "none" else check_tools(ask.tools)
        messages = llm.conversation(ask.messages)
        self.tool_format: ToolFormat | None = None
        if self.tools or any(message.tool_calls or message.role in ("tool", "ipython") for message in messages):
            self.tool_format = llm.tool_format if ask.template is None else tool_format(self.template, llm.tokenizer)
        self.prompt = self._fit(model, ask, messages)
        if not self.tools:
            self.tool_format = None
        self.constraint = self._constrain(model, ask)

    def _fit(self, model: ServedModel, ask: ChatAsk, messages: list[Message]) -> Prompt:
        limit = _limit(model, ask)
        while True:
            prompt = self._render(model, ask, messages)
            if ask.last_tokens is not None:
                prompt = replace(prompt, ids=prompt.ids[-ask.last_tokens :])
            if len(prompt.ids) < limit:
                return prompt
            oldest = next((i for i, message in enumerate(messages[:-1]) if message.role != "system"), None)
            if not ask.truncate or oldest is None:
                raise _too_long(len(prompt.ids), limit)
            del messages[oldest]

    def _render(self, model: ServedModel, ask: ChatAsk, messages: list[Message]) -> Prompt:
        shown = ToolConversation(messages)
        if self.tool_format is not None:
            shown = tool_conversation(self.tool_format, messages, self.tools)
        thinking = {} if ask.think is None else {"enable_thinking": ask.think}
        return render_prompt(
            self.template,
            model.llm.tokenizer,
            shown.messages,
            tools=shown.tools,
            add_generation_prompt=ask.add_generation_prompt and not ask.continue_final_message,
            continue_final_message=ask.continue_final_message,
            **{**shown.variables, **thinking, **ask.template_variables},
        )

    def _constrain(self, model: ServedModel, ask: ChatAsk) -> Constraint | None:
        if self.tool_format is None:
            return ask.constraint
        named = ask.tool_choice not in ("auto", "required")
        choice = (
            ToolChoice("auto")
            if ask.tool_choice == "auto"
            else ToolChoice("required", (named and ask.tool_choice) or None)
        )
        grammar = tool_grammar(self.tool_format, self.tools, choice, ask.parallel_tool_calls)
        if grammar is None:
            return ask.constraint
        if ask.constraint is not None and choice.mode == "auto":
            raise RequestError("strict tools and a format of the answer exclude each other; ask for one of them")
        return model.llm.constraints.lark(grammar)


def text_pieces(model: ServedModel, ids: Sequence[int], ask: Ask) -> Pieces:
    """The continuations of raw tokens. Raises RequestError."""
    return texts_pieces(model, [ids], ask)


def texts_pieces(model: ServedModel, prompts: Sequence[Sequence[int]], ask: Ask) -> Pieces:
    """The continuations of several prompts: the first ``ask.n`` answers are the first's. Raises RequestError."""
    limit = _limit(model, ask)
    requests: list[Request] = []
    for ids in prompts:
        if ask.last_tokens is not None:
            ids = ids[-ask.last_tokens :]
        if len(ids) >= limit:
            if not ask.truncate:
                raise _too_long(len(ids), limit)
            ids = ids[len(ids) - limit + 1 :]
        requests += _requests(model, ask, ids)
    return Pieces(model, requests, PlainReader)


def infill_prompt(template: Template, tokenizer: Tokenizer, prompt: str, suffix: str) -> list[int] | None:
    """The tokens that ask for what stands between two texts; None where the template has no place for a suffix."""
    if not (isinstance(template, GoTemplate) and template.takes_suffix):
        return None
    return render_prompt(template, tokenizer, [{"role": "user", "content": prompt}], suffix=suffix).ids


def _requests(model: ServedModel, ask: Ask, ids: Sequence[int]) -> list[Request]:
    return [_request(model, ask, ids, i) for i in range(ask.n)]


def _request(model: ServedModel, ask: Ask, ids: Sequence[int], index: int) -> Request:
    params = ask.sampling
    if params.seed is not None and index:
        params = replace(params, seed=params.seed + index)
    most = model.accounting.limits.answer_tokens(ask.tenant, params.max_tokens)
    if ask.shift:
        most = LONGEST_SHIFTED * model.llm.context_length if most is None else most
    elif ask.context_length is not None:
        room = _limit(model, ask) - len(ids)
        most = room if most is None else min(most, room)
    if most is not None and most != params.max_tokens:
        params = replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))
    return Request(
        ids,
        params,
        model.llm.eos_ids,
        ask.constraint,
        cache_salt=ask.tenant,
        tenant=ask.tenant,
        adapter=model.adapter,
        shift=ask.shift,
        num_keep=ask.num_keep,
    )


def _limit(model: ServedModel, ask: Ask) -> int:
    loaded = model.llm.context_length
    return loaded if ask.context_length is None else min(loaded, ask.context_length)


def _too_long(found: int, limit: int) -> ContextError:
    # Clients know this kind of error by the words "is longer than the model's context length".
    return ContextError(
        f"the prompt of {found} tokens is longer than the model's context length allows: a context of {limit} must "
        "hold it and at least one token of answer; shorten it, ask for truncation, or serve the model with a larger "
        "context length"
    )
