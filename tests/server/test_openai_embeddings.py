"""/v1/embeddings: the library's vectors, in OpenAI's shape."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai_schemas import check

from puna.llm import LLM


@pytest.fixture(scope="module")
def library(shared_data: Path) -> Iterator[LLM]:
    with LLM.load(shared_data / "weights" / "stories260K" / "stories260K.gguf") as llm:
        yield llm


def vectors(http: httpx.Client, **fields: Any) -> Any:
    response = http.post("/v1/embeddings", json={"model": "stories", **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_vectors_are_the_librarys(http: httpx.Client, shared_data: Path, library: LLM) -> None:
    texts = ["Once upon a time", "a cat", "the dog ran home"]
    found = vectors(http, input=texts)
    check(shared_data, "CreateEmbeddingResponse", found)
    numbers = np.array([entry["embedding"] for entry in found["data"]])
    np.testing.assert_allclose(numbers, library.embed(texts), atol=1e-5)
    assert [entry["index"] for entry in found["data"]] == [0, 1, 2]
    assert found["usage"]["prompt_tokens"] == sum(len(library.encode(text)) for text in texts)
    ids = [library.encode(text) for text in texts]
    assert vectors(http, input=ids)["data"] == found["data"]
    assert vectors(http, input=texts[1])["data"][0]["embedding"] == found["data"][1]["embedding"]
    assert vectors(http, input=ids[1])["data"][0]["embedding"] == found["data"][1]["embedding"]


def test_base64_is_float32(http: httpx.Client) -> None:
    plain = vectors(http, input="a cat")["data"][0]["embedding"]
    coded = vectors(http, input="a cat", encoding_format="base64")["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(coded), "<f4"), np.array(plain, np.float32))


def test_fewer_dimensions_are_the_first_ones_of_length_1(http: httpx.Client) -> None:
    whole = np.array(vectors(http, input="a cat")["data"][0]["embedding"])
    short = np.array(vectors(http, input="a cat", dimensions=8)["data"][0]["embedding"])
    np.testing.assert_allclose(short, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-6)


def test_truncation_keeps_the_end(http: httpx.Client, library: LLM) -> None:
    ids = library.encode("Once upon a time there was a cat")
    cut = vectors(http, input=ids, truncate_prompt_tokens=3)
    assert cut["data"] == vectors(http, input=ids[-3:])["data"]
    assert cut["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": ""}, "at least 1 character"),
        ({"input": []}, "at least 1 item"),
        ({"input": ["a", ""]}, "at least 1 character"),
        ({"input": [512]}, "outside the vocabulary"),
        ({"input": "a", "dimensions": 65}, "at most 64"),
        ({"input": [1] * 3000}, "longer than the model's context length"),
        ({"input": "a", "encoding_format": "int8"}, "float"),
    ],
)
def test_what_cannot_be_honoured_is_refused(http: httpx.Client, fields: dict[str, Any], message: str) -> None:
    response = http.post("/v1/embeddings", json={"model": "stories", **fields})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
