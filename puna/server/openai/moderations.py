"""/v1/moderations: what a Llama Guard model finds in texts."""

from __future__ import annotations

import asyncio
import re
import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from puna.chat.prompt import Prompt
from puna.chat.template import ChatTemplate
from puna.engine import SamplingParams
from puna.errors import NotFoundError, TemplateError
from puna.server.asking import Ask, ChatAsk, chat_prompt, texts_pieces
from puna.server.auth import Tenant
from puna.server.http_errors import FieldError
from puna.server.manager import ServedModel
from puna.server.openai.answers import collect
from puna.server.openai.fields import Body
from puna.server.openai.guard import answer_pattern, listed_categories, moderation, read_verdict
from puna.server.pieces import Pieces
from puna.server.records import new_id
from puna.server.sending import json_response, unless_disconnected
from puna.server.service import Service, TheService

router = APIRouter(tags=["OpenAI"])

# OpenAI's own models: whoever asks for one wants moderation, and gets what is here.
_ANY_GUARD = re.compile(r"(omni|text)-moderation-[a-z0-9-]+")
_AS_PARTS = (
    "{%- set messages = [{'role': messages[0]['role'], "
    "'content': [{'type': 'text', 'text': messages[0]['content']}]}] -%}"
)
_SAMPLING = SamplingParams(temperature=0, max_tokens=96, logprobs=True, top_logprobs=20)


class Part(Body):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: Any = Field(None, description="Refused: guard models here read text only.")


class ModerationBody(Body):
    """A request to moderate texts. Parts are moderated together, texts of a list each on its own."""

    input: str | Annotated[list[str], Field(min_length=1, max_length=2048)] | Annotated[list[Part], Field(min_length=1)]
    model: str | None = None


@router.post("/v1/moderations", response_model=None)
async def create_moderation(body: ModerationBody, request: Request, service: TheService, tenant: Tenant) -> Response:
    """Say whether texts are harmful."""
    return await unless_disconnected(request, moderate(service, body, tenant))


async def moderate(service: Service, body: ModerationBody, share: str) -> Response:
    """The whole answer. Raises NotFoundError where no guard model is stored, and what else is wrong."""
    texts = _texts(body)
    async with service.manager.use(await asyncio.to_thread(_guard, service, body.model)) as model:
        pieces, categories = await asyncio.to_thread(_ask, model, texts, share)
        async with pieces:
            answers = await collect(pieces)
    tokenizer = model.llm.tokenizer
    verdicts = [read_verdict(answer.text, answer.tokens, tokenizer) for answer in answers]
    results = [moderation(verdict, categories) for verdict in verdicts]
    return json_response({"id": new_id("modr-"), "model": model.name, "results": results})


def is_guard(name: str) -> bool:
    """Whether a model's name says that it is a Llama Guard."""
    return "llamaguard" in re.sub(r"[-_ .]", "", name.lower())


def _guard(service: Service, name: str | None) -> str:
    """The model to ask: the one that is named, else a loaded guard, else the smallest stored one."""
    if name is not None and not _ANY_GUARD.fullmatch(name):
        if not is_guard(str(service.store.locate(name))):
            raise FieldError(f"{name} is no guard model; leave model out, or name a Llama Guard", "model")
        return name
    loaded = [model.name for model in service.manager.loaded() if is_guard(model.name)]
    stored = sorted((model for model in service.store.models() if is_guard(model.name)), key=lambda model: model.size)
    names = [*loaded, *(str(model.model_name) for model in stored)]
    if not names:
        raise NotFoundError(
            "no guard model is stored; fetch one, for instance with `puna pull llama-guard-3-1b`, and ask again"
        )
    return names[0]


def _texts(body: ModerationBody) -> list[str]:
    if isinstance(body.input, str):
        return [body.input]
    given: list[str | Part] = [*body.input]
    texts = [part for part in given if isinstance(part, str)]
    parts: list[str] = []
    for i, part in enumerate(given):
        if isinstance(part, Part):
            if part.type == "image_url" or part.text is None:
                raise FieldError(f"input.{i}: guard models here read text only", f"input.{i}")
            parts.append(part.text)
    return texts or ["\n".join(parts)]


def _ask(model: ServedModel, texts: list[str], share: str) -> tuple[Pieces, dict[str, str]]:
    """The guard's answers on their way, and the categories that it knows. Raises RequestError, TemplateError."""
    template, categories = _template(model)
    prompts = [_prompt(model, text, template, share).ids for text in texts]
    constraint = model.llm.constraints.regex(answer_pattern(list(categories)))
    return texts_pieces(model, prompts, Ask(_SAMPLING, constraint=constraint, tenant=share)), categories


def _template(model: ServedModel) -> tuple[str | None, dict[str, str]]:
    """The template that shows the guard a text (None: its own, as it is), and the categories that the guard is told.

    Raises TemplateError when there is none.
    """
    own = model.llm.template
    tried: list[str | None] = [None]
    if isinstance(own, ChatTemplate):
        tried.append(_AS_PARTS + own.source)  # for templates that read a message in parts
    probe = secrets.token_hex(16)
    for template in tried:
        shown = _prompt(model, probe, template, "").text
        if probe in shown:
            return template, listed_categories(shown)
    raise TemplateError(f"the chat template of {model.name} does not show the text that it should judge")


def _prompt(model: ServedModel, text: str, template: str | None, share: str) -> Prompt:
    """The guard's prompt about a text."""
    messages = [{"role": "user", "content": text}]
    return chat_prompt(model, ChatAsk(_SAMPLING, messages=messages, template=template, tenant=share))
