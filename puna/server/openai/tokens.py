"""vLLM's routes for the exact tokens: /tokenize, /detokenize, and what a request would have given to the model."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import Field

from puna.server.asking import ChatAsk, chat_prompt
from puna.server.auth import Tenant
from puna.server.http_errors import FieldError
from puna.server.manager import ServedModel
from puna.server.openai.chat import ChatBody, chat_ask, check_chat, last_tokens
from puna.server.openai.completions import CompletionBody, check_completion, prompt_ids, prompts_as_ids
from puna.server.openai.fields import Body, TokenId
from puna.server.openai.messages import ChatMessage, Tool
from puna.server.openai.sampling import check_ids
from puna.server.sending import json_response
from puna.server.service import TheService

router = APIRouter(tags=["Tokens"])


class TokenizeBody(Body):
    """A text (``prompt``) or a conversation (``messages``)."""

    model: str
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = Field(
        None, description="Of a text: whether BOS comes first, where the model wants it."
    )
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(Body):
    model: str
    tokens: list[TokenId]


@router.post("/tokenize", response_model=None)
async def tokenize(body: TokenizeBody, service: TheService) -> Response:
    """The tokens of a text or a conversation."""
    if (body.prompt is None) == (body.messages is None):
        raise FieldError("give either prompt or messages", "prompt")
    async with service.manager.use(body.model) as model:
        tokenizer = model.llm.tokenizer
        ids = await _tokens_of(model, body)
        return json_response(
            {
                "count": len(ids),
                "max_model_len": model.llm.context_length,
                "tokens": ids,
                "token_strs": [tokenizer.id_to_token(i) for i in ids] if body.return_token_strs else None,
            }
        )


async def _tokens_of(model: ServedModel, body: TokenizeBody) -> list[int]:
    tokenizer = model.llm.tokenizer
    if body.messages is not None:
        given = body.model_dump(
            include={
                "model",
                "tools",
                "add_generation_prompt",
                "continue_final_message",
                "chat_template",
                "chat_template_kwargs",
            }
        )
        chat = ChatBody(messages=body.messages, **given)
        check_chat(chat)
        ask = await chat_ask(model, chat, "")
        return (await asyncio.to_thread(chat_prompt, model, ask)).ids
    assert body.prompt is not None
    if body.add_special_tokens is False:
        return await asyncio.to_thread(tokenizer.encode, body.prompt, parse_special=True)
    return await asyncio.to_thread(prompt_ids, model.llm, body.prompt)


@router.post("/detokenize", response_model=None)
async def detokenize(body: DetokenizeBody, service: TheService) -> Response:
    """The text of tokens; bytes that are no whole characters become U+FFFD."""
    async with service.manager.use(body.model) as model:
        check_ids(model.llm, body.tokens, "tokens")
        text = model.llm.tokenizer.decode(body.tokens).decode("utf-8", "replace")
    return json_response({"prompt": text})


@router.post("/v1/chat/completions/render", response_model=None)
async def render_chat_completion(body: ChatBody, service: TheService, tenant: Tenant) -> Response:
    """The exact prompt of a chat completion: its text and its ids. Nothing is generated."""
    check_chat(body)
    async with service.manager.use(body.model) as model:
        ask: ChatAsk = await chat_ask(model, body, tenant)
        prompt = await asyncio.to_thread(chat_prompt, model, ask)
    return json_response({"model": body.model, "prompt": prompt.text, "token_ids": prompt.ids})


@router.post("/v1/completions/render", response_model=None)
async def render_completion(body: CompletionBody, service: TheService) -> Response:
    """The exact prompts of a completion: a list, one for each."""
    check_completion(body)
    async with service.manager.use(body.model) as model:
        keep = last_tokens(model, body)
        rendered = []
        for ids in await asyncio.to_thread(prompts_as_ids, model.llm, body):
            ids = ids if keep is None else ids[-keep:]
            text = model.llm.tokenizer.decode(ids).decode("utf-8", "replace")
            rendered.append({"model": body.model, "prompt": text, "token_ids": ids})
    return json_response(rendered)
