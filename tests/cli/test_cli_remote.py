"""``puna ps``, ``puna stop`` and ``puna run`` with a running server."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The server of the server's own tests.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "server"))

from running_server import RunningServer

from puna.cli.remote import Remote, RemoteModel, server_url
from puna.cli.repl import Repl
from puna.errors import RequestError, SourceError
from puna.server.keys import KeyFile
from puna.store import Store, import_file

GREEDY = ["--temperature", "0"]
ANSWER = "The answer to this classic math problem is 4."


@pytest.fixture(scope="module")
def server(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    store = Store(tmp_path_factory.mktemp("served"), notify=lambda _: None)
    import_file(smollm2_path, "smollm2", store=store)
    with RunningServer(store) as running:
        yield running


def test_run_ps_and_stop(puna, server: RunningServer) -> None:
    """In this order: each sees what the one before has done. The command's own store is empty."""
    host = ["--host", server.url]
    assert puna("list").err.startswith("No models yet")
    answer = puna("run", "smollm2", "What is 2+2?", *GREEDY, *host)
    assert (answer.code, answer.out) == (0, f"{ANSWER}\n")
    shown = puna("ps", *host)
    header, row = shown.out.splitlines()
    assert header.split() == ["NAME", "DIGEST", "MEMORY", "CONTEXT", "UNTIL"]
    assert row.startswith("smollm2:latest")
    assert "minutes from now" in row
    assert puna("ps", "--json", *host).json[0]["name"] == "smollm2:latest"
    assert puna("stop", "smollm2", *host).code == 0
    assert puna("ps", *host).err == "No model is loaded.\n"
    facts = puna("run", "smollm2", "--json", *GREEDY, *host, stdin="What is 2+2?").json
    assert (facts["response"], facts["finish_reason"], facts["generated_tokens"]) == (ANSWER, "stop", 12)
    assert facts["load_seconds"] > 0
    assert facts["decode_tokens_per_second"] > 0


def test_options_reach_the_server(puna, server: RunningServer) -> None:
    options = ["--system", "Answer in capitals.", "--num-predict", "5", "--context-length", "512", *GREEDY]
    here = ["run", "smollm2", "What is 2+2?", "--host", server.url]
    assert puna(*here, *options, "--json").json["finish_reason"] == "length"
    stopped = puna(*here, "--stop", "classic", *GREEDY).out
    assert stopped == "The answer to this \n"
    obj = json.loads(puna(*here, "--format", "json", "--num-predict", "60", "--seed", "1").out)
    assert isinstance(obj, dict)
    schema = '{"type": "object", "properties": {"a": {"const": 7}}, "required": ["a"], "additionalProperties": false}'
    assert json.loads(puna(*here, "--format", schema, *GREEDY).out) == {"a": 7}
    assert puna("run", "smollm2", "1, 2, 3,", "--raw", "--num-predict", "6", *GREEDY, "--host", server.url).out == (
        " 4, 5,\n"
    )


def test_the_variable_names_a_server_for_run(puna, server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUNA_HOST", server.url)
    assert puna("run", "smollm2", "What is 2+2?", *GREEDY).out == f"{ANSWER}\n"
    assert puna("ps").code == 0
    refused = puna("run", "smollm2", "Hi", "--threads", "1")
    assert refused.code == 2
    assert f"--threads has no meaning for the server at {server.url}" in refused.err
    monkeypatch.delenv("PUNA_HOST")
    monkeypatch.setenv("OLLAMA_HOST", server.url)
    assert puna("ps").code == 0
    here = puna("run", "smollm2", "Hi")
    assert (here.code, "is not in the model store" in here.err) == (1, True)


def test_errors_are_one_sentence(puna, server: RunningServer) -> None:
    unknown = puna("run", "nothing-like-it", "Hi", "--host", server.url)
    assert (unknown.code, unknown.err.count("\n")) == (1, 1)
    assert "nothing-like-it" in unknown.err
    assert "nothing-like-it" in puna("stop", "nothing-like-it", "--host", server.url).err
    bad = puna("run", "smollm2", "Hi", "--temperature", "1e400", "--host", server.url)
    assert "temperature must be a number" in bad.err
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nobody = puna("ps", "--host", f"127.0.0.1:{port}")
    assert nobody.code == 1
    assert f"no server answers at http://127.0.0.1:{port}" in nobody.err
    assert "--host must be host:port" in puna("ps", "--host", "ftp://x").err


def test_the_key_is_sent(puna, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "locked", notify=lambda _: None)
    secret = KeyFile(store).add("me")
    with RunningServer(store) as running:
        assert "PUNA_API_KEY is the key that is sent" in puna("ps", "--host", running.url).err
        monkeypatch.setenv("PUNA_API_KEY", secret)
        assert puna("ps", "--host", running.url).code == 0


def test_a_conversation(server: RunningServer, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lines = iter(
        [
            "What is 2+2?",
            "/show",
            "/set format json",
            "/set noformat",
            "/load nothing-like-it",
            "What did I ask?",
            "/bye",
        ]
    )
    remote = Remote(server.url)
    repl = Repl(
        RemoteModel(remote, "smollm2"),
        "smollm2",
        sampling={"temperature": 0, "max_tokens": 20},
        read=lambda _: next(lines),
        open_model=lambda name: RemoteModel(remote, remote.show(name)["nothing"]),
    )
    repl.run()
    shown = capsys.readouterr()
    assert shown.out.startswith(ANSWER)
    assert '"format": "gguf"' in shown.out
    assert "nothing-like-it" in shown.err
    assert [message["role"] for message in repl.messages] == ["user", "assistant"] * 2


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("[::]:80", "http://[::1]:80"),
        ("https://llm.example", "https://llm.example:443"),
        ("http://llm.example/", "http://llm.example:80"),
        ("box:1", "http://box:1"),
    ],
)
def test_where_a_server_is(text: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server_url(text, "PUNA_HOST") == url
    monkeypatch.setenv("PUNA_HOST", text)
    assert server_url(None, "PUNA_HOST") == url
    monkeypatch.delenv("PUNA_HOST")
    assert server_url(None, "PUNA_HOST") is None


def test_a_server_that_is_none() -> None:
    """Something else listens there: what it says is no answer."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello")

        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"message": {"content": "half an"}}\n')

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        remote = Remote(f"http://127.0.0.1:{other.server_port}")
        with pytest.raises(SourceError, match="does not answer as one with ollama's API does: '<html>hello'"):
            remote.loaded()
        with pytest.raises(SourceError, match="ended before the answer was complete"):
            list(RemoteModel(remote, "m").chat([]))
        with pytest.raises(RequestError, match="top_p"):
            RemoteModel(remote, "m").sampling(top_p=2.0)
        other.shutdown()
