"""Settings: who wins, and what is refused."""

from __future__ import annotations

import math

import pytest

from puna.errors import RequestError
from puna.server.settings import parse_bytes, parse_duration, parse_host, read_settings


def test_options_win_over_our_variables_and_those_over_ollamas() -> None:
    environment = {
        "OLLAMA_HOST": "0.0.0.0:1234",
        "OLLAMA_KEEP_ALIVE": "1h30m",
        "OLLAMA_NUM_PARALLEL": "4",
        "PUNA_PARALLEL": "8",
        "OLLAMA_ORIGINS": "http://a.example, app://*",
        "PUNA_LOG_REQUESTS": "true",
    }
    settings = read_settings({"port": 99, "threads": None}, environment)
    assert (settings.host, settings.port, settings.keep_alive, settings.parallel) == ("0.0.0.0", 99, 5400.0, 8)
    assert settings.origins == ("http://a.example", "app://*")
    assert settings.log_requests
    assert settings.threads is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ("127.0.0.1", 11434)),
        ("1.2.3.4", ("1.2.3.4", 11434)),
        (":8080", ("127.0.0.1", 8080)),
        ("example.com:56789", ("example.com", 56789)),
        ("http://1.2.3.4", ("1.2.3.4", 80)),
        ("https://1.2.3.4", ("1.2.3.4", 443)),
        ("https://example.com:7/path", ("example.com", 7)),
        ("[::1]:1337", ("::1", 1337)),
        ("::1", ("::1", 11434)),
        ("[::1]", ("::1", 11434)),
    ],
)
def test_hosts_are_read_as_ollama_reads_them(text: str, expected: tuple[str, int]) -> None:
    assert parse_host(text, "OLLAMA_HOST") == expected


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0),
        (300, 300),
        ("5m", 300),
        ("1h30m", 5400),
        ("-1", math.inf),
        (-1, math.inf),
        ("1.5s", 1.5),
        ("-5m", math.inf),
    ],
)
def test_durations(value: object, seconds: float) -> None:
    assert parse_duration(value, "keep_alive") == seconds


@pytest.mark.parametrize("value", ["", "5 minutes", "m", True, None, [], "1h-3m", float("nan")])
def test_what_is_no_duration_is_refused(value: object) -> None:
    with pytest.raises(RequestError, match="keep_alive must be seconds or a duration"):
        parse_duration(value, "keep_alive")


def test_bad_variables_are_named() -> None:
    for variable, value in (("PUNA_PARALLEL", "many"), ("OLLAMA_MAX_QUEUE", "-1"), ("PUNA_HOST", "a:b:c:99999x")):
        with pytest.raises(RequestError, match=variable):
            read_settings({}, {variable: value})
    assert parse_bytes("1.5GB", "x") == 1_500_000_000
    with pytest.raises(RequestError, match="PUNA_MEMORY_BUDGET"):
        read_settings({}, {"PUNA_MEMORY_BUDGET": "lots"})
