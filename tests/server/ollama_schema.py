"""ollama's own description of its API, as a judge of our answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import yaml

# Told by ollama's guide (ollama-api.md), or by its Python client, and missing in the OpenAPI file.
MORE = {
    "GenerateResponse": {"context"},
    "GenerateStreamEvent": {"context", "logprobs"},
    "ChatStreamEvent": {
        "done_reason",
        "total_duration",
        "load_duration",
        "prompt_eval_count",
        "prompt_eval_duration",
        "eval_count",
        "eval_duration",
        "logprobs",
    },
    "ShowResponse": {"modelfile", "system", "messages"},
    "VersionResponse": {"puna"},
}


class OllamaSchema:
    """Validates answers against the published components, and refuses keys that neither they nor the guide have."""

    def __init__(self, shared_data: Path) -> None:
        document = yaml.safe_load((shared_data / "api" / "ollama-openapi.yaml").read_text())
        self._components = document["components"]

    def check(self, name: str, value: Any) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": self._components}
        jsonschema.validate(value, schema)
        known = self._components["schemas"][name]["properties"].keys() | MORE.get(name, set())
        assert value.keys() <= known, value.keys() - known
