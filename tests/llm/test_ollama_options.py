"""ollama's options: what each becomes, clear refusals, and a documented table that is the one in the code."""

from pathlib import Path
from typing import Any

import pytest

from puna.engine import SamplingParams
from puna.errors import RequestError
from puna.llm.ollama_options import OPTIONS, OllamaOptions, parameters_from_text, parse_options

DOCS = Path(__file__).resolve().parents[2] / "docs" / "modelfile.md"


def test_every_option_goes_where_it_belongs() -> None:
    options = parse_options(
        {
            "num_ctx": 4096,
            "num_predict": 42,
            "num_keep": 5,
            "num_batch": 2,
            "num_thread": 8,
            "num_gpu": 1,
            "use_mmap": True,
            "temperature": 0.5,
            "top_k": 20.0,
            "seed": 7,
            "stop": ["\n", "user:"],
            "min_p": None,
        }
    )
    sampling = {"temperature": 0.5, "top_k": 20, "max_tokens": 42, "seed": 7, "stop": ["\n", "user:"]}
    assert options == OllamaOptions(sampling, 4096, 5, 2, 8)
    assert isinstance(options.sampling["top_k"], int)
    assert SamplingParams(**options.sampling).max_tokens == 42
    assert parse_options({}) == OllamaOptions()


@pytest.mark.parametrize("options", [{"mirostat": 0}, {"tfs_z": 1}])
def test_values_that_mean_off(options: dict[str, Any]) -> None:
    assert parse_options(options) == OllamaOptions()


@pytest.mark.parametrize("count", [0, -1, -2])
def test_no_limit_and_no_seed_lift_those_of_a_model(count: int) -> None:
    assert parse_options({"num_predict": count, "seed": -1}).sampling == {"max_tokens": None, "seed": None}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"temprature": 1}, "'temprature' is not known; did you mean temperature"),
        ({"wild": 1}, "known: num_ctx, "),
        ({"num_ctx": 0}, "num_ctx must be a whole number of at least 1"),
        ({"top_k": 1.5}, "top_k must be a whole number, found 1.5"),
        ({"top_k": True}, "top_k must be a number"),
        ({"temperature": "hot"}, "temperature must be a number, found 'hot'"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"stop": [""]}, "stop must be texts"),
        ({"stop": 3}, "stop must be texts"),
        ({"use_mmap": 1}, "use_mmap must be true or false"),
        ({"mirostat": 2}, "mirostat = 2 is not supported"),
    ],
)
def test_what_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        parse_options(options)


def test_texts_of_a_modelfile_become_values() -> None:
    given = [("stop", "a"), ("temperature", "1"), ("stop", "b"), ("num_ctx", "64"), ("numa", "True"), ("top_k", "1")]
    assert parameters_from_text([*given, ("top_k", "2")]) == {
        "stop": ["a", "b"],
        "temperature": 1.0,
        "num_ctx": 64,
        "numa": True,
        "top_k": 2,
    }
    for name, text in (("num_ctx", "many"), ("temperature", "warm"), ("numa", "perhaps")):
        with pytest.raises(RequestError, match=name):
            parameters_from_text([(name, text)])


def test_the_documentation_lists_every_option() -> None:
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    expected = [f"| `{name}` | {option.status} | {option.note} |" for name, option in OPTIONS.items()]
    assert [row for row in expected if row not in rows] == []
