"""What people made for ollama works with Puna, unchanged: its Python client, LangChain, the llm tool."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import ollama
import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolCall
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from pydantic import BaseModel, Field
from running_server import RunningServer

from puna.store import Store

QUESTION = [{"role": "user", "content": "What is 2+2?"}]
ANSWER = "The answer to this classic math problem is 4."
GREEDY = {"temperature": 0, "num_predict": 40}


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=120)


@pytest.fixture
def client(server: RunningServer) -> ollama.Client:
    return ollama.Client(host=server.url)


def test_chat_and_generate(client: ollama.Client) -> None:
    answer = client.chat("smollm2", QUESTION, options=GREEDY)
    assert (answer.message.content, answer.done_reason) == (ANSWER, "stop")
    stream = client.chat("smollm2", QUESTION, stream=True, options=GREEDY)
    assert "".join(part.message.content or "" for part in stream) == ANSWER
    generated = client.generate("smollm2", "What is 2+2?", options=ollama.Options(temperature=0))
    assert generated.response == ANSWER
    assert generated.context
    stream_generated = client.generate("smollm2", "What is 2+2?", stream=True, options=GREEDY)
    assert "".join(part.response or "" for part in stream_generated) == ANSWER
    scored = client.generate("smollm2", "What is 2+2?", options=GREEDY, logprobs=True, top_logprobs=2)
    assert scored.logprobs is not None
    assert "".join(entry.token for entry in scored.logprobs) == ANSWER


def test_the_asynchronous_client(server: RunningServer) -> None:
    async def use() -> list[str]:
        client = ollama.AsyncClient(host=server.url)

        async def answer() -> str:
            parts = [p async for p in await client.chat("smollm2", QUESTION, stream=True, options=GREEDY)]
            return "".join(part.message.content or "" for part in parts)

        return await asyncio.gather(*(answer() for _ in range(4)))

    assert asyncio.run(use()) == [ANSWER] * 4


def test_structured_output(client: ollama.Client) -> None:
    messages = [{"role": "user", "content": "Describe a person called Ann as JSON."}]
    answer = client.chat("smollm2", messages, format=Person.model_json_schema(), options={"temperature": 0})
    assert answer.message.content
    Person.model_validate_json(answer.message.content)


def get_weather(city: str) -> str:
    """Get the current weather of a city.

    Args:
      city: the city's name
    """
    return f"sunny in {city}"


def calls_so_far() -> list[dict[str, Any]]:
    """A small model does as was done before."""
    messages: list[dict[str, Any]] = []
    for city in ("Rome", "Oslo", "Lima"):
        call = {"function": {"name": "get_weather", "arguments": {"city": city}}}
        messages.append({"role": "user", "content": f"What is the weather in {city}?"})
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    return [*messages, {"role": "user", "content": "What is the weather in Paris?"}]


def test_tools(client: ollama.Client) -> None:
    messages = calls_so_far()
    answer = client.chat("smollm2", messages, tools=[get_weather], options=GREEDY)
    (call,) = answer.message.tool_calls or ()
    assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "Paris"})
    assert (answer.message.content, answer.done_reason) == ("", "stop")
    parts = list(client.chat("smollm2", messages, tools=[get_weather], options=GREEDY, stream=True))
    assert [c.function for part in parts for c in part.message.tool_calls or ()] == [call.function]
    result = {"role": "tool", "content": get_weather("Paris"), "tool_name": "get_weather"}
    final = client.chat("smollm2", [*messages, answer.message, result], tools=[get_weather], options=GREEDY)
    assert final.done_reason in ("stop", "length")
    broken_off = client.chat("smollm2", messages, tools=[get_weather], options={**GREEDY, "num_predict": 14})
    assert (broken_off.done_reason, broken_off.message.tool_calls) == ("length", None)
    assert "get_weather" in (broken_off.message.content or "")


def test_a_models_life_with_blobs(client: ollama.Client, shared_data: Path) -> None:
    digest = client.create_blob(shared_data / "weights" / "stories260K" / "stories260K.gguf")
    steps = client.create("tales", files={"tales.gguf": digest}, parameters={"num_predict": 3}, stream=True)
    assert [step.status for step in steps][-1] == "success"
    assert client.create("more-tales", from_="tales", system="Once", license=["free"]).status == "success"
    assert client.show("more-tales").license == "free"
    assert client.generate("tales", "Once").eval_count == 3
    for name in ("tales", "more-tales"):
        assert client.delete(name).status == "success"


def test_embeddings(client: ollama.Client) -> None:
    both = client.embed("stories", ["a cat", "a dog"]).embeddings
    assert len(both) == 2
    assert sum(x * x for x in both[0]) == pytest.approx(1, abs=1e-5)
    assert list(client.embeddings("stories", "a cat").embedding) == list(both[0])
    assert len(client.embed("stories", "a cat", dimensions=5).embeddings[0]) == 5


def test_the_life_of_a_model(client: ollama.Client, model_store: Store) -> None:
    names = [model.model for model in client.list().models]
    assert {"smollm2:latest", "stories:latest"} <= set(names)
    shown = client.show("stories")
    assert shown.details is not None
    assert (shown.details.family, shown.details.quantization_level) == ("llama", "F32")
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "llama"
    assert client.copy("stories", "a-copy").status == "success"
    client.generate("a-copy", keep_alive="1h")
    running = {model.name: model for model in client.ps().models}["a-copy:latest"]
    assert running.expires_at is not None
    assert running.expires_at > datetime.now().astimezone()
    assert client.delete("a-copy").status == "success"
    with pytest.raises(ollama.ResponseError, match="a-copy") as caught:
        client.delete("a-copy")
    assert caught.value.status_code == 404


def test_errors_reach_the_caller(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="no model missing") as caught:
        client.chat("missing", QUESTION)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="no model missing"):
        list(client.generate("missing", "x", stream=True))
    with pytest.raises(ollama.ResponseError, match="images"):
        client.chat("smollm2", [{"role": "user", "content": "x", "images": [b"png"]}])
    with pytest.raises(ollama.ResponseError, match="puna convert"):
        client.push("smollm2")
    with pytest.raises(ollama.ResponseError, match="no model named 'missing'"):
        list(client.pull("missing", stream=True))


def test_langchain(server: RunningServer) -> None:
    chat = ChatOllama(model="smollm2", base_url=server.url, temperature=0, num_predict=40, validate_model_on_init=True)
    messages = [HumanMessage("What is 2+2?")]
    answer = chat.invoke(messages)
    assert answer.content == ANSWER
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["input_tokens"] > 0
    assert "".join(str(part.content) for part in chat.stream(messages)) == ANSWER
    history = [SystemMessage("Be brief."), *messages, AIMessage(ANSWER), HumanMessage("And 3+4?")]
    assert chat.invoke(history).content
    earlier: list[BaseMessage] = []
    for city in ("Rome", "Oslo", "Lima"):
        call = ToolCall(name="get_weather", args={"city": city}, id=city)
        earlier += [HumanMessage(f"What is the weather in {city}?"), AIMessage("", tool_calls=[call])]
    bound = chat.bind_tools([get_weather]).invoke([*earlier, HumanMessage("What is the weather in Paris?")])
    assert bound.tool_calls[0]["args"] == {"city": "Paris"}
    person = chat.with_structured_output(Person).invoke("Describe a person called Ann as JSON.")
    assert isinstance(person, Person)
    assert OllamaLLM(model="smollm2", base_url=server.url, temperature=0).invoke("What is 2+2?") == ANSWER
    embeddings = OllamaEmbeddings(model="stories", base_url=server.url)
    assert len(embeddings.embed_documents(["a cat", "a dog"])) == 2
    assert asyncio.run(chat.ainvoke(messages)).content == ANSWER


def test_the_llm_tool(server: RunningServer, tmp_path: Path) -> None:
    pytest.importorskip("llm_ollama", reason="pip install llm-ollama")
    # Only this plugin: the one that brings SmolLM2 to these tests wants another engine.
    only = {"LLM_LOAD_PLUGINS": "llm-ollama", "LLM_USER_PATH": str(tmp_path)}
    environment = {**os.environ, **only, "OLLAMA_HOST": server.url}

    def llm(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    assert "smollm2:latest" in llm("ollama", "models")
    options: list[Any] = ["-o", "temperature", "0", "-o", "num_predict", "40"]
    assert llm("-m", "ollama/smollm2:latest", "What is 2+2?", *options) == ANSWER
    assert llm("-m", "ollama/smollm2:latest", "--no-stream", "What is 2+2?", *options) == ANSWER
