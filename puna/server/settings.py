"""What a server is told when it starts: from options, else PUNA_* variables, else ollama's, else defaults."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from puna.errors import RequestError

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 11434
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


@dataclass(frozen=True)
class ServerSettings:
    """``keep_alive`` is in seconds, infinite for ever; ``memory_budget`` in bytes, None for what is free at the start.

    ``context_length`` of None is the model's, at most 8192. ``parallel`` requests of a model are computed together;
    ``max_queue`` more may wait. ``origins`` are what browsers may call from (``*``: any), beside this machine's own.
    Adapters may be loaded from files in ``adapter_dir``.
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    api_keys: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    origins: tuple[str, ...] = ()
    max_queue: int = 512
    max_loaded: int = 3
    keep_alive: float = 300.0
    context_length: int | None = None
    parallel: int = 64
    threads: int | None = None
    kv_type: str | None = None
    memory_budget: int | None = None
    adapter_dir: Path | None = None
    log_requests: bool = False
    insecure: bool = False

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls_cert else 'http'}://{host}:{self.port}"


# Field of ServerSettings: ollama's variable of the same meaning. PUNA_<FIELD> wins over it.
OLLAMA_VARIABLES = {
    "keep_alive": "OLLAMA_KEEP_ALIVE",
    "context_length": "OLLAMA_CONTEXT_LENGTH",
    "parallel": "OLLAMA_NUM_PARALLEL",
    "max_loaded": "OLLAMA_MAX_LOADED_MODELS",
    "max_queue": "OLLAMA_MAX_QUEUE",
    "origins": "OLLAMA_ORIGINS",
}


def read_settings(options: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> ServerSettings:
    """Settings from options that were given (not None) and the environment. Raises RequestError naming the variable."""
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    for name in ("OLLAMA_HOST", "PUNA_HOST"):
        if environment.get(name):
            values["host"], values["port"] = parse_host(environment[name], name)
    for field in fields(ServerSettings):
        for variable in (OLLAMA_VARIABLES.get(field.name, ""), f"PUNA_{field.name.upper()}"):
            if variable and field.name != "host" and environment.get(variable):
                values[field.name] = _parse(field.name, environment[variable], variable)
    values.update({name: value for name, value in options.items() if value is not None})
    return ServerSettings(**values)


def parse_host(text: str, where: str) -> tuple[str, int]:
    """``host``, ``host:port``, ``:port`` or a URL of these, as OLLAMA_HOST may have. Raises RequestError."""
    scheme, separator, rest = text.strip().rpartition("://")
    if separator and scheme not in ("http", "https"):
        raise RequestError(f"{where} must be host:port, found {text!r}")
    rest = rest.split("/", 1)[0]
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]*)(?::(\d{1,5}))?", rest)
    if found is None and rest.count(":") > 1:
        found = re.fullmatch(r"([0-9a-fA-F:.]+)()", rest)  # an IPv6 address on its own
    if found is None or (found[2] and int(found[2]) > 65535):
        raise RequestError(f"{where} must be host:port, found {text!r}")
    default = {"http": 80, "https": 443}.get(scheme, DEFAULT_PORT)
    return found[1].strip("[]") or DEFAULT_HOST, int(found[2]) if found[2] else default


def parse_duration(value: Any, where: str) -> float:
    """Seconds, from a number or a duration such as ``5m`` or ``1h30m``; negative: for ever. Raises RequestError."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value):
        return math.inf if value < 0 else float(value)
    if isinstance(value, str):
        text = value.strip()
        try:
            return parse_duration(float(text), where)
        except ValueError:
            pass
        negative, text = text.startswith("-"), text.lstrip("+-")
        parts = _DURATION.findall(text)
        if parts and "".join(number + unit for number, unit in parts) == text:
            return math.inf if negative else sum(float(number) * _UNITS[unit] for number, unit in parts)
    raise RequestError(
        f"{where} must be seconds or a duration such as 5m or 1h30m (negative: for ever), found {value!r}"
    )


def parse_bytes(text: str, where: str) -> int:
    """Bytes, from a number with or without a decimal unit: ``500MB``, ``2GB``. Raises RequestError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kMGT]?)B?)?", text.strip(), re.IGNORECASE | re.ASCII)
    if found is None:
        raise RequestError(f"{where} must be a size such as 500MB or 2GB, found {text!r}")
    return int(float(found[1]) * 1000 ** " KMGT".index((found[2] or " ").upper()))


def _parse(field: str, text: str, variable: str) -> Any:
    if field == "keep_alive":
        return parse_duration(text, variable)
    if field == "memory_budget":
        return parse_bytes(text, variable)
    if field in ("origins", "api_keys"):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if field in ("tls_cert", "tls_key", "adapter_dir"):
        return Path(text).expanduser()
    if field in ("log_requests", "insecure"):
        return text.strip().lower() in ("1", "true", "yes", "on")
    if field == "kv_type":
        return text.strip()
    lowest = {"port": 0, "max_queue": 0}.get(field, 1)
    if not (text.strip().isascii() and text.strip().isdigit() and int(text) >= lowest):
        raise RequestError(f"{variable} must be a whole number of at least {lowest}, found {text!r}")
    return int(text)
