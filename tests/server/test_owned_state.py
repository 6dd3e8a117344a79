"""Files, batches and responses belong to the key that made them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from running_server import RunningServer

from puna.server.keys import KeyFile
from puna.store import Store, import_file

LINE = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/completions",
    "body": {"model": "stories", "prompt": "Once", "max_tokens": 4},
}


@pytest.fixture
def clients(shared_data: Path, tmp_path: Path) -> Iterator[tuple[openai.OpenAI, openai.OpenAI]]:
    store = Store(tmp_path / "home", notify=lambda _: None)
    import_file(shared_data / "weights" / "stories260K" / "stories260K.gguf", "stories", store=store)
    keys = KeyFile(store)
    with RunningServer(store) as server:
        secrets = (keys.add("ann", max_tokens=4), keys.add("bob"))
        made = [openai.OpenAI(base_url=f"{server.url}/v1", api_key=secret, max_retries=0) for secret in secrets]
        yield made[0], made[1]


def test_other_keys_do_not_see_them(clients: tuple[openai.OpenAI, openai.OpenAI]) -> None:
    ann, bob = clients
    file = ann.files.create(file=("a.jsonl", json.dumps(LINE).encode()), purpose="batch")
    batch = ann.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    assert [found.id for found in ann.batches.list()] == [batch.id]
    assert list(bob.files.list()) == list(bob.batches.list()) == []
    for call, name in (
        (bob.files.retrieve, file.id),
        (bob.files.content, file.id),
        (bob.files.delete, file.id),
        (bob.batches.retrieve, batch.id),
        (bob.batches.cancel, batch.id),
    ):
        with pytest.raises(openai.NotFoundError):
            call(name)
    with pytest.raises(openai.NotFoundError):
        bob.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    assert ann.files.retrieve(file.id) == file


def test_a_batch_has_the_limits_of_its_key(clients: tuple[openai.OpenAI, openai.OpenAI]) -> None:
    ann, _ = clients
    more = {**LINE, "custom_id": "b", "body": {**LINE["body"], "max_tokens": 5}}  # type: ignore[dict-item]
    data = "\n".join(map(json.dumps, (LINE, more))).encode()
    file = ann.files.create(file=("a.jsonl", data), purpose="batch")
    batch = ann.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    while batch.status != "completed":
        time.sleep(0.02)
        batch = ann.batches.retrieve(batch.id)
    assert json.loads(ann.files.content(batch.output_file_id or "").text)["custom_id"] == "a"
    refused = json.loads(ann.files.content(batch.error_file_id or "").text)
    assert "at most 4 tokens" in refused["response"]["body"]["error"]["message"]


def test_without_a_key_there_is_nothing(clients: tuple[openai.OpenAI, openai.OpenAI]) -> None:
    nobody = clients[0].with_options(api_key="wrong")
    for call in (nobody.files.list, nobody.batches.list, lambda: nobody.responses.retrieve("resp_x")):
        with pytest.raises(openai.AuthenticationError):
            call()
