"""The commands' side of a server: where it is, and its models as if they were here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from puna.engine import SamplingParams, Timings
from puna.errors import AccessError, CapacityError, PunaError, RequestError, SourceError, StoreError
from puna.llm.answers import Chunk
from puna.server.settings import DEFAULT_HOST, DEFAULT_PORT, parse_host

if TYPE_CHECKING:
    import httpx

_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_KINDS: dict[int, type[PunaError]] = {401: AccessError, 403: AccessError, 404: StoreError, 429: CapacityError}
_NANOSECONDS = 1e9


def server_url(host: str | None, *variables: str) -> str | None:
    """The server that ``--host`` or the first set variable names; None when none does. Raises RequestError.

    Where a server listens on every address, it is reached at this machine's own.
    """
    given = [("--host", host), *((name, os.environ.get(name)) for name in variables)]
    for where, text in given:
        if text:
            name, port = parse_host(text, where)
            name = _ANYWHERE.get(name, name)
            scheme = "https" if text.strip().startswith("https://") else "http"
            return f"{scheme}://{f'[{name}]' if ':' in name else name}:{port}"
    return None


class Remote:
    """A server, Puna's or another with ollama's API. PUNA_API_KEY is the key that it is sent.

    Every method raises PunaError: SourceError when no server answers, and the server's own errors by their kind.
    """

    def __init__(self, url: str | None = None) -> None:
        import httpx

        self.url = url or f"http://{DEFAULT_HOST}:{DEFAULT_PORT}"
        key = os.environ.get("PUNA_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Loading a model takes its time; only the connection must come soon.
        self._client = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(None, connect=5))

    def loaded(self) -> list[dict[str, Any]]:
        """The models in the server's memory, as /api/ps has them."""
        models = self._json("GET", "/api/ps").get("models")
        return list(models or [])

    def unload(self, model: str) -> None:
        """Drop a model from memory, once nobody uses it."""
        self._json("POST", "/api/generate", {"model": model, "keep_alive": 0, "stream": False})

    def show(self, model: str) -> dict[str, Any]:
        """What a model is, as /api/show has it."""
        return self._json("POST", "/api/show", {"model": model})

    def lines(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The lines of a streamed answer; leaving early ends it at the server too."""
        with self._errors(), self._client.stream("POST", path, json=body) as response:
            if response.is_error:
                response.read()
                raise _error(response)
            for line in response.iter_lines():
                found = _parse(line)
                if "error" in found:
                    raise RequestError(str(found["error"]))
                yield found

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        with self._errors():
            response = self._client.request(method, path, json=body)
        if response.is_error:
            raise _error(response)
        return _parse(response.text)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.ConnectError as error:
            raise SourceError(f"no server answers at {self.url} ({error}); `puna serve` starts one") from None
        except httpx.HTTPError as error:
            raise SourceError(f"the server at {self.url} broke off: {error or type(error).__name__}") from None


class RemoteModel:
    """A model of a server, with what ``puna run`` and its conversations use of an LLM."""

    has_template = True  # the server applies it

    def __init__(self, remote: Remote, name: str, context_length: int | None = None) -> None:
        """``load_seconds`` is what loading took, of the last answer."""
        self.remote = remote
        self.name = name
        self.context_length = context_length
        self.constraints = _Formats()
        self.load_seconds = 0.0

    def sampling(self, **values: Any) -> SamplingParams:
        """Raises RequestError for values that are none."""
        return SamplingParams(**values)

    def chat(self, messages: Sequence[Mapping[str, Any]], *, constraint: Any = None, **options: Any) -> Iterator[Chunk]:
        """The answer to a conversation, as it comes."""
        body = {"messages": list(messages)} | self._common(constraint, options)
        return self._chunks("/api/chat", body, lambda line: line.get("message", {}).get("content", ""))

    def generate(
        self, text: str, *, system: str | None = None, raw: bool = False, constraint: Any = None, **options: Any
    ) -> Iterator[Chunk]:
        """The answer to one prompt, or with ``raw`` the text's continuation, as it comes."""
        body = {"prompt": text, "raw": raw} | self._common(constraint, options)
        if system is not None:
            body["system"] = system
        return self._chunks("/api/generate", body, lambda line: line.get("response", ""))

    def _common(self, constraint: Any, options: dict[str, Any]) -> dict[str, Any]:
        for name in ("stream", "adapter"):  # an answer always comes as it is made; an adapter is named with its model
            options.pop(name, None)
        chosen = _options(options)
        if self.context_length is not None:
            chosen["num_ctx"] = self.context_length
        body = {"model": self.name, "options": chosen}
        return body if constraint is None else body | {"format": constraint}

    def _chunks(self, path: str, body: Mapping[str, Any], text_of: Callable[[dict[str, Any]], str]) -> Iterator[Chunk]:
        for line in self.remote.lines(path, body):
            if line.get("done"):
                self.load_seconds = line.get("load_duration", 0) / _NANOSECONDS
                full = line.get("done_reason") == "length"
                yield Chunk(0, text_of(line), finish_reason="length" if full else "stop", timings=_timings(line))
                return
            yield Chunk(0, text_of(line))
        raise SourceError(f"the server at {self.remote.url} ended before the answer was complete")


class _Formats:
    """What the API's field ``format`` may be, where an LLM has its constraints."""

    def json_object(self) -> Any:
        return "json"

    def json_schema(self, schema: Any) -> Any:
        return schema


def _options(values: Mapping[str, Any]) -> dict[str, Any]:
    """ollama's options for fields of SamplingParams: all but one have the same name."""
    options = dict(values)
    if "max_tokens" in options:
        most = options.pop("max_tokens")
        options["num_predict"] = -1 if most is None else most
    if "stop" in options:
        options["stop"] = list(options["stop"])
    return options


def _timings(line: Mapping[str, Any]) -> Timings:
    return Timings(
        prompt_tokens=line.get("prompt_eval_count", 0),
        generated_tokens=line.get("eval_count", 0),
        prefill_seconds=line.get("prompt_eval_duration", 0) / _NANOSECONDS,
        decode_seconds=line.get("eval_duration", 0) / _NANOSECONDS,
    )


def _parse(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise SourceError(f"the server does not answer as one with ollama's API does: {text[:80]!r}")
    return found


def _error(response: httpx.Response) -> PunaError:
    """The server's own sentence, of the kind that its status says."""
    try:
        message = str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        message = f"the server answered {response.status_code} {response.reason_phrase}"
    kind = _KINDS.get(response.status_code, SourceError if response.status_code >= 500 else RequestError)
    if kind is AccessError:
        message += "; PUNA_API_KEY is the key that is sent"
    return kind(message)
