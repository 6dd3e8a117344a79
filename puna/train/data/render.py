"""Samples as token ids with a loss mask: exactly what the model reads, and would have to write, when it is served.

For each assistant message, the prompt that a server would make of the messages before it is rendered, and the
conversation up to and with it. What the second has beyond the first is what is learnt, up to the token that ends the
turn. Turns share one document as long as a later one's text begins with the earlier one's; where the template shows
earlier turns otherwise (one that drops their reasoning does), each gets a document of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from puna.chat.go_template import GoTemplate
from puna.chat.messages import Message
from puna.chat.prompt import Prompt, render_prompt
from puna.chat.template import Template
from puna.chat.tools import ToolConversation, ToolFormat, check_tools, tool_conversation, tool_format
from puna.errors import DataError
from puna.tokenizer import Tokenizer
from puna.train.data.examples import Continuation, Conversation, Example, Sample, samples_of
from puna.train.data.tokens import Tokens

TrainOn = Literal["assistant", "last", "everything"]
_PROBE = "\ue0fd an answer \ue0fd"


@dataclass(frozen=True)
class _Turn:
    """``ids`` up to the end of one assistant message; it begins at ``start``."""

    ids: list[int]
    start: int


class Renderer:
    """Renders for one model. ``template`` is None for a base model, which can be trained on raw text only.

    ``train_on``: every ``assistant`` message that the data says to learn, the ``last`` of them, or ``everything``, the
    prompts too. ``system`` is put before conversations without a system message, and ``history`` before what follows
    that, as a served model's own are (``LLM.conversation``).
    ``variables`` are the template's (``date_string``, ``enable_thinking``); a template that writes today's date gives
    the same ids tomorrow only if that is pinned here.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template | None,
        *,
        train_on: TrainOn = "assistant",
        system: str | None = None,
        history: Sequence[Message] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._template = template
        self._train_on = train_on
        self._system = system
        self._history = list(history)
        self._variables = dict(variables or {})

    def documents(self, example: Example) -> list[Tokens]:
        """All that an example is trained with: its documents, or one for each answer that is compared or labelled.

        Raises as ``render`` does.
        """
        if isinstance(example, (Conversation, Continuation)):
            return self.render(example)
        return [self.render_answer(sample) for sample in samples_of(example)]

    def render(self, sample: Sample) -> list[Tokens]:
        """The documents that a sample makes. Raises DataError when the template can't show it as it is served,
        RequestError and TemplateError when the template rejects it."""
        if isinstance(sample, Continuation):
            return [self._continuation(sample)]
        shown, trained = self._shown(sample)
        turns = [self._turn(shown, number) for number in trained]
        documents: list[tuple[list[int], list[tuple[int, int]]]] = []
        for turn in reversed(turns):
            end = len(turn.ids)
            if not documents or documents[-1][0][:end] != turn.ids:
                documents.append((turn.ids, []))
            documents[-1][1].append((turn.start, end))
        everything = self._train_on == "everything"
        return [Tokens.of(ids, [(0, len(ids))] if everything else spans) for ids, spans in reversed(documents)]

    def render_answer(self, sample: Sample) -> Tokens:
        """One document, of which the last answer is trained, for objectives that score whole answers. Raises as
        ``render`` does."""
        if isinstance(sample, Continuation):
            return self._continuation(sample)
        shown, trained = self._shown(sample)
        turn = self._turn(shown, trained[-1])
        # An answer of several messages (a call, its result, the words) is scored as one where one document shows it.
        spans = [(turn.start, len(turn.ids))]
        for number in trained[:-1]:
            earlier = self._turn(shown, number)
            if turn.ids[: len(earlier.ids)] != earlier.ids:
                raise DataError(
                    "the chat template shows the answer's earlier messages otherwise than they were written"
                )
            spans.append((earlier.start, len(earlier.ids)))
        return Tokens.of(turn.ids, spans)

    def _continuation(self, sample: Continuation) -> Tokens:
        """BOS if the model wants it, the prompt, the text, and the token that ends it."""
        tokenizer = self.tokenizer
        first = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        prompt = tokenizer.encode(sample.prompt) if sample.prompt else []
        text = tokenizer.encode_continuation(sample.text) if sample.prompt else tokenizer.encode(sample.text)
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        ids = [*first, *prompt, *text, *end]
        start = 0 if self._train_on == "everything" else len(first) + len(prompt)
        return Tokens.of(ids, [(start, len(ids))])

    @cached_property
    def _tool_format(self) -> ToolFormat:
        return tool_format(self._chat_template, self.tokenizer)

    @property
    def _chat_template(self) -> Template:
        if self._template is None:
            raise DataError(
                "this model has no chat template, so it cannot be trained on conversations; train it on raw text "
                "(text, or prompt and completion), or give it a template"
            )
        return self._template

    def _shown(self, sample: Conversation) -> tuple[ToolConversation, list[int]]:
        """The conversation as a server hands it to the template, and the numbers of its messages to learn."""
        messages, trained = list(sample.messages), set(sample.trained)
        if self._system is not None and not any(message.role == "system" for message in messages):
            messages.insert(0, Message("system", self._system))
        head = 1 if messages[0].role == "system" else 0
        messages[head:head] = self._history
        trained = {number + len(messages) - len(sample.messages) for number in trained}
        if self._train_on == "last":
            trained = {max(trained)}
        if not sample.tools and not any(m.tool_calls or m.role in ("tool", "ipython") for m in messages):
            return ToolConversation(messages), sorted(trained)
        tools = check_tools(sample.tools)

        def converted(end: int) -> ToolConversation:
            return tool_conversation(self._tool_format, messages[:end], tools)

        # Messages are merged and taken apart on the way; their assistants stay in order, so they are known by counting.
        shown = converted(len(messages))
        assistants = _assistants(shown)
        found: list[int] = []
        for number in sorted(trained):
            before, after = len(_assistants(converted(number))), len(_assistants(converted(number + 1)))
            found += assistants[before:after]
        return shown, found

    def _turn(self, shown: ToolConversation, number: int) -> _Turn:
        """The prompt that asks for message ``number`` of what is shown, and the message."""
        if number == 0:
            raise DataError("messages[0] is the assistant's, but no prompt comes before it; begin with the user's")
        served = self._prompt(shown, shown.messages[:number], True)
        start = len(served.ids)
        if isinstance(self._chat_template, GoTemplate):
            return _Turn(self._followed(shown, number, served.ids), start)
        written = self._prompt(shown, shown.messages[: number + 1], False)
        ids = written.ids
        drops_reasoning = _drops_reasoning(shown.messages[number], served.text, written.text)
        if ids[:start] != served.ids or drops_reasoning:
            ids = served.ids + self._answer(shown, number, served.text, written.text, drops_reasoning)
        return _Turn(ids[: self._end(ids, start)], start)

    def _followed(self, shown: ToolConversation, number: int, served: list[int]) -> list[int]:
        """The ids up to the end of an answer by a template in Go's language, which ends one only where more follows."""
        ids = self._prompt(shown, [*shown.messages[: number + 1], Message("user", _PROBE)], True).ids
        start = len(served)
        end = next((place + 1 for place in range(start, len(ids)) if ids[place] in self.tokenizer.eos_ids), start)
        answer = self.tokenizer.decode(ids[start:end]).decode("utf-8", "replace")
        if ids[:start] != served or end == start or _PROBE in answer:
            raise DataError(
                f"messages[{number}]: the chat template, in Go's language, does not end this answer by a control token "
                "behind the prompt that asks for it; give the model a Jinja template"
            )
        return ids[:end]

    def _prompt(self, shown: ToolConversation, messages: Sequence[Message], add_generation_prompt: bool) -> Prompt:
        return render_prompt(
            self._chat_template,
            self.tokenizer,
            messages,
            tools=shown.tools,
            add_generation_prompt=add_generation_prompt,
            **{**shown.variables, **self._variables},
        )

    def _answer(
        self, shown: ToolConversation, number: int, served: str, written: str, drops_reasoning: bool
    ) -> list[int]:
        """The ids of a message that follow a prompt, where those of both together aren't the prompt's and all of the
        message: because a token would cross the border, because the template ends prompts within the answer
        (``<think>``) or leaves its reasoning out, or because it shows the message before it in its own way.
        """
        message = shown.messages[number]
        if message.tool_calls:
            raise DataError(
                f"messages[{number}]: the chat template does not show these calls as the answer to its prompt"
            )
        probe = [*shown.messages[:number], Message("assistant", _PROBE)]
        frame = self._prompt(shown, probe, False).text
        head, found, end = frame.rpartition(_PROBE)
        asks = self._asks(shown, number, served)
        if found and served.startswith(head):
            opening = served[len(head) :]
        elif found and asks and head.endswith(asks):
            opening = ""  # what comes before is shown otherwise once it isn't last
        else:
            raise DataError(
                f"messages[{number}]: the chat template shows answers otherwise than its prompts lead to them, so this "
                "model would not be served what it was trained on; use another template"
            )
        if not opening and not drops_reasoning:
            answer = written[len(head) : len(written) - len(end)]
        else:
            answer = _with_reasoning(message)
            if not answer.startswith(opening):
                raise DataError(
                    f"messages[{number}]: the chat template begins every answer with {opening!r}, which this one does "
                    "not; write the reasoning into it, or use another template"
                )
            answer = answer[len(opening) :]
        return self.tokenizer.encode_continuation(answer) + self.tokenizer.encode(end, parse_special=True)

    def _asks(self, shown: ToolConversation, number: int, served: str) -> str:
        """What the template writes to ask for an answer; empty when it is not told apart."""
        before = self._prompt(shown, shown.messages[:number], False).text
        return served[len(before) :] if served.startswith(before) else ""

    def _end(self, ids: Sequence[int], start: int) -> int:
        """Behind the token that ends the turn which begins at ``start``; the template may have written more."""
        for ending in (self.tokenizer.eos_ids, self.tokenizer.special_ids - {self.tokenizer.unk_id}):
            for place in range(len(ids) - 1, start - 1, -1):
                if ids[place] in ending:
                    return place + 1
        return len(ids)


def _assistants(shown: ToolConversation) -> list[int]:
    return [number for number, message in enumerate(shown.messages) if message.role == "assistant"]


def _drops_reasoning(message: Message, served: str, written: str) -> bool:
    """Whether the template leaves out what the model has to think: many do, lest it fill the context."""
    reasoning, _, _ = _with_reasoning(message).rpartition("</think>")
    return reasoning.removeprefix("<think>").strip() not in written.removeprefix(served)


def _with_reasoning(message: Message) -> str:
    if message.reasoning_content is None:
        return message.text
    return f"<think>\n{message.reasoning_content}\n</think>\n\n{message.text}"
