"""From the pieces of an answer to the events of a response, and so to the response itself."""

from __future__ import annotations

import time
from typing import Any

from puna.chat.tools import TextDelta, ThinkingDelta, ToolCallArguments, ToolCallStart
from puna.errors import PunaError
from puna.server.openai.logprobs import chat_logprobs
from puna.server.openai.response_input import PlainItem, item_id
from puna.server.pieces import Delta, Piece, check_finished
from puna.tokenizer import Tokenizer

Event = dict[str, Any]


class ResponseEvents:
    """The events of one response in their order: ``start``, ``take`` for every piece, then ``end`` or ``fail``.

    ``response`` is the response as it is now.
    """

    def __init__(self, response: dict[str, Any], tokenizer: Tokenizer) -> None:
        self.response = response
        self._tokenizer = tokenizer
        self._output: list[PlainItem] = response["output"]
        self._number = 0
        self._texts: list[str] = []  # of the item that is being written
        self._open: PlainItem | None = None
        self._final: Piece | None = None

    def start(self) -> list[Event]:
        return [self._snapshot("created"), self._snapshot("in_progress")]

    def take(self, piece: Piece) -> list[Event]:
        """Raises CapacityError for an answer that the server gave up."""
        check_finished(piece)
        events: list[Event] = []
        logprobs = chat_logprobs(self._tokenizer, piece.tokens)["content"] if piece.tokens else []
        for delta in piece.deltas:
            events += self._delta(delta, logprobs)
            if isinstance(delta, TextDelta):
                logprobs = []
        if piece.finish_reason is not None:
            self._final = piece
            complete = piece.finish_reason != "length"
            if not self._output:
                events += self._begin_text()
            events += self._close("completed" if complete else "incomplete")
            self._finish(piece, complete)
        return events

    def end(self) -> Event:
        """The last event of an answer whose last piece was taken."""
        return self._snapshot(self.response["status"])

    def fail(self, error: PunaError) -> Event:
        """The last event when there is no answer."""
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": str(error)}}
        return self._snapshot("failed")

    def _finish(self, piece: Piece, complete: bool) -> None:
        usage = piece.usage
        assert usage is not None
        thoughts = [part["text"] for item in self._output if item["type"] == "reasoning" for part in item["content"]]
        self.response |= {
            "status": "completed" if complete else "incomplete",
            "completed_at": int(time.time()) if complete else None,
            "incomplete_details": None if complete else {"reason": "max_output_tokens"},
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.generated_tokens,
                "output_tokens_details": {"reasoning_tokens": sum(len(self._tokenizer.encode(t)) for t in thoughts)},
                "total_tokens": usage.prompt_tokens + usage.generated_tokens,
            },
        }

    def _delta(self, delta: Delta, logprobs: list[dict[str, Any]]) -> list[Event]:
        match delta:
            case TextDelta(text):
                events = [] if self._is_open("message") else [*self._close(), *self._begin_text()]
                self._texts.append(text)
                self._part()["logprobs"] += logprobs
                shown = {"delta": text, "logprobs": logprobs}
                return [*events, self._event("output_text.delta", **self._place(), **shown)]
            case ThinkingDelta(text):
                events = [] if self._is_open("reasoning") else [*self._close(), *self._begin_thinking()]
                self._texts.append(text)
                return [*events, self._event("reasoning_text.delta", **self._place(), delta=text)]
            case ToolCallStart(_, call_id, name):
                call = {"type": "function_call", "id": item_id("fc"), "call_id": call_id, "name": name, "arguments": ""}
                return [*self._close(), self._begin(call)]
            case ToolCallArguments(_, fragment):
                self._texts.append(fragment)
                place = self._place()
                del place["content_index"]
                return [self._event("function_call_arguments.delta", **place, delta=fragment)]

    def _is_open(self, kind: str) -> bool:
        return self._open is not None and self._open["type"] == kind

    def _begin_text(self) -> list[Event]:
        item = {"type": "message", "id": item_id("msg"), "role": "assistant", "content": []}
        return self._begin_with(item, {"type": "output_text", "text": "", "annotations": [], "logprobs": []})

    def _begin_thinking(self) -> list[Event]:
        item = {"type": "reasoning", "id": item_id("rs"), "summary": [], "content": []}
        return self._begin_with(item, {"type": "reasoning_text", "text": ""})

    def _begin_with(self, item: PlainItem, part: dict[str, Any]) -> list[Event]:
        added = self._begin(item)
        item = self._output[-1]
        event = self._event("content_part.added", **self._place(), part=dict(part))
        item["content"] = [part]
        return [added, event]

    def _begin(self, item: PlainItem) -> Event:
        self._open = {**item, "status": "in_progress"}
        self._output.append(self._open)
        self._texts = []
        return self._event("output_item.added", output_index=len(self._output) - 1, item=dict(self._open))

    def _close(self, status: str = "completed") -> list[Event]:
        """The events that end the open item."""
        item, text = self._open, "".join(self._texts)
        if item is None:
            return []
        place = self._place()
        if item["type"] == "function_call":
            item["arguments"] = text
            del place["content_index"]
            events = [self._event("function_call_arguments.done", **place, name=item["name"], arguments=text)]
        else:
            part = self._part()
            part["text"] = text
            more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            events = [
                self._event(f"{part['type']}.done", **place, text=text, **more),
                self._event("content_part.done", **place, part=dict(part)),
            ]
        item["status"] = status
        self._open = None
        return [*events, self._event("output_item.done", output_index=place["output_index"], item=dict(item))]

    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = self._output[-1]["content"][0]
        return part

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}

    def _snapshot(self, status: str) -> Event:
        return self._event(status, response={**self.response, "output": list(self._output)})

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": f"response.{kind}", "sequence_number": self._number, **fields}
        self._number += 1
        return event
