"""POST /api/generate: one prompt, one answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from puna.chat.go_template import chat_template
from puna.chat.prompt import render_prompt
from puna.chat.template import Template
from puna.errors import RequestError
from puna.server.asking import Ask, ChatAsk, chat_pieces, infill_prompt, text_pieces
from puna.server.manager import ServedModel
from puna.server.ollama.answering import Call, ask_of, joined, load_or_unload, piece_lines, think_of
from puna.server.ollama.bodies import GenerateBody, JsonRoute, no_images
from puna.server.ollama.streaming import Answer, Line
from puna.server.pieces import Pieces
from puna.server.service import TheService

router = APIRouter(route_class=JsonRoute)


@router.post("/api/generate", summary="Continue a prompt")
async def generate(body: GenerateBody, service: TheService, request: Request) -> Response:
    """An answer to a prompt, as JSON lines or (`stream` false) one object. An empty prompt loads the model."""
    call = Call.of(service, body, request)
    if body.images:
        raise no_images()
    if not body.prompt and not body.suffix:
        return JSONResponse(await load_or_unload(call, {"response": ""}))
    return Answer(_lines(call, body), _whole if body.stream is False else None)


async def _lines(call: Call, body: GenerateBody) -> AsyncGenerator[Line, None]:
    text: list[str] = []
    async with call.use() as model:
        call.loaded()
        ask = await ask_of(model, call, body)
        pieces = await asyncio.to_thread(_pieces, model, body, ask)

        def part(response: str, thinking: str, _calls: list[Line]) -> Line:
            text.append(response)
            return {"response": response, "thinking": thinking} if thinking else {"response": response}

        def last() -> Line:
            if body.raw:
                return {}
            return {"context": [*pieces.requests[0].prompt_ids, *model.llm.tokenizer.encode("".join(text))]}

        async with aclosing(piece_lines(call, model, body, pieces, part, last)) as lines:
            async for line in lines:
                yield line


def _pieces(model: ServedModel, body: GenerateBody, ask: Ask) -> Pieces:
    """Raises RequestError, TemplateError."""
    llm, prompt = model.llm, body.prompt or ""
    if body.raw:
        _refuse_beside(body, "raw", "system", "template", "context", "suffix", "think")
        return text_pieces(model, _encode(model, prompt, parse_special=True), ask)
    source = body.template or (llm.template.source if llm.has_template else "")
    think = think_of(body, source)
    if body.suffix:
        _refuse_beside(body, "suffix", "system", "context", "think")
        return text_pieces(model, _around(model, body), ask)
    if not source:
        if body.system:
            raise RequestError(f"{body.model} has no template, so there is no place for system; send it in the prompt")
        ids = _encode(model, prompt, parse_special=False)
        return text_pieces(model, _after(body.context or (), ids, model), ask)
    if body.context:
        _refuse_beside(body, "context", "think")
        return text_pieces(model, [*body.context, *_next_turn(model, body)], ask)
    chat = ChatAsk(**vars(ask), messages=_messages(body), think=think, template=body.template or None)
    return chat_pieces(model, chat)[1]


def _refuse_beside(body: GenerateBody, field: str, *others: str) -> None:
    """Raises RequestError when a field is given that ``field`` leaves no place for."""
    for other in others:
        if getattr(body, other):
            raise RequestError(f"{other} and {field} exclude each other; remove one of them")


def _messages(body: GenerateBody) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": body.prompt or ""}]
    return [{"role": "system", "content": body.system}, *messages] if body.system else messages


def _template(model: ServedModel, body: GenerateBody) -> Template:
    return chat_template(body.template, model.llm.tokenizer) if body.template else model.llm.template


def _around(model: ServedModel, body: GenerateBody) -> list[int]:
    """The prompt that asks for what stands between ``prompt`` and ``suffix``. Raises RequestError, TemplateError."""
    template = _template(model, body)
    ids = infill_prompt(template, model.llm.tokenizer, body.prompt or "", body.suffix or "")
    if ids is None:
        raise RequestError(
            f"{body.model} does not support insert: a suffix needs a template with a place for it ({{{{ .Suffix }}}})"
        )
    return ids


def _next_turn(model: ServedModel, body: GenerateBody) -> list[int]:
    """What the template puts between the text of an answer and the next one: the end of the turn, the new message.

    Raises RequestError where a template does not let that be told.
    """
    llm = model.llm
    template = _template(model, body)
    earlier = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    before = render_prompt(
        template, llm.tokenizer, earlier, add_generation_prompt=False, continue_final_message=True
    ).ids
    whole = render_prompt(template, llm.tokenizer, [*earlier, *_messages(body)]).ids
    if whole[: len(before)] != before:
        raise RequestError(
            f"context: the template of {body.model} does not tell where an answer ends; send the conversation to "
            "/api/chat instead"
        )
    return whole[len(before) :]


def _encode(model: ServedModel, text: str, *, parse_special: bool) -> list[int]:
    tokenizer = model.llm.tokenizer
    ids = tokenizer.encode(text, add_bos=tokenizer.add_bos, parse_special=parse_special)
    return ids[1:] if ids[:2] == [tokenizer.bos_id] * 2 else ids  # a raw prompt may spell it itself


def _after(context: Sequence[int], ids: list[int], model: ServedModel) -> list[int]:
    """``ids`` behind ``context``, with one BOS for both."""
    bos = model.llm.tokenizer.bos_id
    return [*context, *(ids[1:] if context and ids[:1] == [bos] else ids)]


def _whole(lines: Sequence[Line]) -> Line:
    return joined(lines, lambda line: line)
