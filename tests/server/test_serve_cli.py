"""``puna serve`` itself: what it refuses, how it ends, and what it prints."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from serve_process import ServeProcess

from puna.cli.main import main
from puna.server.keys import KeyFile
from puna.server.running import Server, check_settings
from puna.server.settings import ServerSettings, read_settings
from puna.store import Store, import_file


@pytest.fixture
def home(tmp_path: Path, shared_data: Path) -> Path:
    """A store with ``stories``."""
    store = Store(tmp_path / "home", notify=lambda _: None)
    import_file(shared_data / "weights" / "stories260K" / "stories260K.gguf", "stories", store=store)
    return store.home


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run ``puna serve`` for the one sentence with which it ends at once."""

    def run(*options: str, **environment: str) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(Server, "run", lambda *_, **__: pytest.fail("it serves"))
            for name, value in {"PUNA_HOME": str(tmp_path), **environment}.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as ended:
                main(["serve", *options])
        assert ended.value.code == 1
        sentence = capsys.readouterr().err
        assert sentence.startswith("Error: ")
        assert sentence.count("\n") == 1
        return sentence

    return run


def generate(url: str, **body: object) -> httpx.Response:
    return httpx.post(f"{url}/api/generate", json={"model": "stories", "prompt": "Once", **body}, timeout=60)


def test_a_signal_ends_it_cleanly(tmp_path: Path) -> None:
    with ServeProcess(tmp_path, PUNA_KEEP_ALIVE="-1") as serving:
        assert httpx.get(f"{serving.url}/readyz").json() == {"status": "ok"}
        assert serving.stop(signal.SIGINT) == 0
        (line,) = serving.log()
    assert line["event"] == "serving"
    assert (line["url"], line["keep_alive"], line["max_queue"]) == (serving.url, "for ever", 512)


@pytest.fixture
def counting(smollm2_path: Path, tmp_path: Path) -> tuple[Path, dict[str, object]]:
    """A store with SmolLM2, and a request that makes it count for as long as it may: seconds at least."""
    store = Store(tmp_path / "home", notify=lambda _: None)
    import_file(smollm2_path, "smollm2", store=store)
    return store.home, {"model": "smollm2", "prompt": "1, 2, 3, 4, 5,", "raw": True}


def test_what_runs_is_finished_and_what_comes_is_refused(counting: tuple[Path, dict[str, object]]) -> None:
    home, body = counting
    body["options"] = {"num_predict": 200, "temperature": 0}
    with (
        ServeProcess(home) as serving,
        httpx.Client(base_url=serving.url, timeout=60) as other,
        httpx.stream("POST", f"{serving.url}/api/generate", json=body, timeout=60) as stream,
    ):
        lines = stream.iter_lines()
        assert not json.loads(next(lines))["done"]
        serving.process.send_signal(signal.SIGTERM)
        while other.get("/readyz").status_code == 200:
            pass
        refused = other.post("/api/generate", json=body)
        assert refused.status_code == 503
        assert refused.json() == {"error": "the server is stopping"}
        assert other.get("/livez").status_code == 200
        last = json.loads(list(lines)[-1])
        assert (last["done"], last["eval_count"]) == (True, 200)
        assert serving.process.wait(60) == 0
        assert [line["status"] for line in serving.log() if line.get("path") == "/api/generate"] == [503, 200]


def test_a_second_signal_cancels(counting: tuple[Path, dict[str, object]]) -> None:
    home, body = counting
    body["options"] = {"num_predict": -1, "temperature": 0}
    with (
        ServeProcess(home) as serving,
        httpx.stream("POST", f"{serving.url}/api/generate", json=body, timeout=60) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        serving.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{serving.url}/readyz").status_code == 200:
            pass
        serving.process.send_signal(signal.SIGTERM)
        assert "error" in json.loads(list(lines)[-1])
        assert serving.process.wait(60) == 0
        (line,) = [line for line in serving.log() if line.get("path") == "/api/generate"]
        assert line["finish_reasons"] == ["cancelled"]


def test_a_port_in_use_is_said_so(refused: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refused("--port", str(port)) == (
            f"Error: port {port} of 127.0.0.1 is in use, perhaps by another Puna or by ollama; stop that, or choose "
            "another with --port\n"
        )


def test_addresses_that_are_none(refused: Callable[..., str]) -> None:
    assert "is no address of this machine" in refused("--host", "no.such.host.invalid", "--api-key", "k")
    assert "cannot listen on 203.0.113.7" in refused("--host", "203.0.113.7", "--api-key", "k")


def test_beyond_this_machine_it_needs_a_key(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "without a key" in refused("--host", "0.0.0.0")
    assert "without a key" in refused(OLLAMA_HOST="0.0.0.0:0")
    secret = KeyFile(Store(tmp_path)).add("alice")
    with ServeProcess(tmp_path, "--host", "0.0.0.0") as serving:
        url = serving.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/metrics", headers={"x-api-key": secret}).status_code == 200
    KeyFile(Store(tmp_path)).remove("alice")
    check_settings(ServerSettings(host="0.0.0.0", insecure=True), Store(tmp_path))


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# ours\nfirst\n\nsecond\n")
    with ServeProcess(tmp_path, "--api-key-file", str(tmp_path / "keys")) as serving:
        for key, status in (("first", 200), ("second", 200), ("# ours", 401), ("", 401)):
            assert httpx.get(f"{serving.url}/metrics", headers={"x-api-key": key}).status_code == status
    settings = read_settings({}, {"PUNA_API_KEYS": "one, two"})
    assert settings.api_keys == ("one", "two")


def test_keys_that_are_made_while_it_runs_work_at_once(tmp_path: Path) -> None:
    with ServeProcess(tmp_path) as serving:
        assert httpx.get(f"{serving.url}/metrics").status_code == 200
        secret = KeyFile(Store(tmp_path)).add("bob")
        assert httpx.get(f"{serving.url}/metrics").status_code == 401
        assert httpx.get(f"{serving.url}/metrics", headers={"x-api-key": secret}).status_code == 200
        KeyFile(Store(tmp_path)).remove("bob")
        assert httpx.get(f"{serving.url}/metrics", headers={"x-api-key": secret}).status_code == 401


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl program to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


def test_tls(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    with ServeProcess(tmp_path, "--tls-cert", str(cert), "--tls-key", str(key)) as serving:
        assert serving.url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=str(cert))
        assert httpx.get(f"{serving.url}/livez", verify=trusting).json() == {"status": "ok"}
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{serving.url}/livez")
        with pytest.raises(httpx.TransportError):
            httpx.get(serving.url.replace("https", "http"))
        assert serving.stop() == 0


def test_certificates_that_are_none(
    tmp_path: Path, certificate: tuple[Path, Path], refused: Callable[..., str]
) -> None:
    cert, key = certificate
    assert "must be a certificate and its key" in refused("--tls-cert", str(key), "--tls-key", str(key))
    assert "No such file" in refused("--tls-cert", str(tmp_path / "none.pem"), "--tls-key", str(key))
    assert "--tls-key needs --tls-cert" in refused("--tls-key", str(key))
    locked = tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "ec", "-in", str(key), "-aes256", "-passout", "pass:x", "-out", str(locked)],
        check=True,
        capture_output=True,
    )
    assert "encrypted" in refused("--tls-cert", str(cert), "--tls-key", str(locked))


def test_two_servers_on_one_store(home: Path) -> None:
    """Both use the same model at once, and one goes on when the other is gone."""
    with ServeProcess(home) as first, ServeProcess(home) as second:
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(
                target=lambda url=one.url: answers.append(generate(url, stream=False, options={"seed": 1}))
            )
            for one in (first, second)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers[0].json()["response"] == answers[1].json()["response"] != ""
        first.process.kill()
        first.process.wait()
        assert generate(second.url, stream=False).status_code == 200
        copied = httpx.post(f"{second.url}/api/copy", json={"source": "stories", "destination": "mine"})
        assert copied.status_code == 200
        assert second.stop() == 0
    assert sorted(str(manifest.model_name) for manifest in Store(home).models()) == ["mine:latest", "stories:latest"]
    assert Store(home).verify() == []
