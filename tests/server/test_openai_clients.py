"""The real clients: openai (both kinds) and litellm."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import openai
import pytest
from pydantic import BaseModel
from running_server import RunningServer

QUESTION: Any = [{"role": "user", "content": "What is 2+2?"}]
ANSWER = "The answer to this classic math problem is 4."


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, logprobs=True)
    assert whole.choices[0].message.content == ANSWER
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content
    assert content is not None
    assert "".join(token.token for token in content) == ANSWER
    stream = client.chat.completions.create(
        model="smollm2", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == ANSWER
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_the_streaming_helper_and_its_final_completion(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="smollm2", messages=QUESTION, temperature=0) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == ANSWER
    assert final.choices[0].finish_reason == "stop"


def test_many_at_once_by_the_asynchronous_client(server: RunningServer) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            create = client.chat.completions.create
            return await asyncio.gather(
                *(create(model="smollm2", messages=QUESTION, temperature=0, seed=i) for i in range(8))
            )

    assert [found.choices[0].message.content for found in asyncio.run(ask())] == [ANSWER] * 8


class Mood(BaseModel):
    mood: Literal["good", "bad"]
    score: Literal[1, 2, 3]


def test_parse_gives_an_object_of_the_class(client: openai.OpenAI) -> None:
    found = client.chat.completions.parse(
        model="smollm2", messages=QUESTION, response_format=Mood, temperature=0, max_completion_tokens=300
    )
    assert isinstance(found.choices[0].message.parsed, Mood)


def test_vllms_fields_go_through_the_extra_body(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="smollm2", messages=QUESTION, extra_body={"structured_outputs": {"choice": ["four", "five"]}, "top_k": 1}
    )
    assert found.choices[0].message.content in ("four", "five")


def test_an_answer_goes_back_into_the_conversation(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0).choices[0].message
    more: Any = [*QUESTION, first.model_dump(), {"role": "user", "content": "And 3+3?"}]
    second = client.chat.completions.create(model="smollm2", messages=more, temperature=0, max_tokens=8)
    assert second.choices[0].message.content


def test_completions_and_embeddings(client: openai.OpenAI) -> None:
    text = client.completions.create(model="stories", prompt="Once upon", temperature=0, max_tokens=8, logprobs=1)
    parts = client.completions.create(model="stories", prompt="Once upon", temperature=0, max_tokens=8, stream=True)
    assert "".join(part.choices[0].text for part in parts) == text.choices[0].text
    plain = client.embeddings.create(model="stories", input=["a cat"], encoding_format="float").data[0].embedding
    coded = client.embeddings.create(model="stories", input=["a cat"]).data[0].embedding  # the client asks for base64
    np.testing.assert_allclose(coded, plain, atol=1e-7)


def test_models(client: openai.OpenAI) -> None:
    assert "smollm2:latest" in [model.id for model in client.models.list()]
    assert client.models.retrieve("smollm2").id == "smollm2:latest"


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nothing"):
        client.chat.completions.create(model="nothing", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="smollm2", messages=QUESTION, extra_body={"frobnicate": 1})
    assert found.value.param == "frobnicate"
    with pytest.raises(openai.BadRequestError) as found:
        client.chat.completions.create(model="smollm2", messages=QUESTION, stream=True, temperature=-1)
    assert found.value.param == "temperature"


@pytest.fixture(scope="module")
def litellm() -> Any:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the network for prices
    return pytest.importorskip("litellm")


def test_litellm(server: RunningServer, litellm: Any) -> None:
    options = {"api_base": f"{server.url}/v1", "api_key": "none"}
    whole = litellm.completion("openai/smollm2", QUESTION, temperature=0, **options)
    assert whole.choices[0].message.content == ANSWER
    chunks = litellm.completion("openai/smollm2", QUESTION, temperature=0, stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    more = [*QUESTION, whole.choices[0].message.model_dump(), {"role": "user", "content": "And 3+3?"}]
    assert litellm.completion("openai/smollm2", more, temperature=0, max_tokens=8, **options).choices
    vector = litellm.embedding("openai/stories", ["a cat"], **options).data[0]["embedding"]
    assert len(vector) == 64
    text = litellm.text_completion(model="text-completion-openai/stories", prompt="Once upon", max_tokens=4, **options)
    assert text.choices[0].text
    long = [{"role": "user", "content": "a b " * 6000}]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion("openai/smollm2", long, **options)
