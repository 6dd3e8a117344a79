"""LoRA adapters from Python and from the command line, and the same text as llama.cpp."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lora_files import write_lora_gguf, write_peft
from tiny_models import random_adapter

from puna.cli.llama_cpp import find_program
from puna.errors import CheckpointError, PunaError, RequestError
from puna.llm import LLM

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    return shared_data / "weights" / "stories260K"


@pytest.fixture
def llm(stories: Path) -> Iterator[LLM]:
    with LLM.load(stories / "hf") as model:
        yield model


def tell(llm: LLM, adapter: str | None = None, tokens: int = 40) -> str:
    return llm.generate(PROMPT, temperature=0, max_tokens=tokens, adapter=adapter).text


def test_from_python(llm: LLM, stories: Path, tmp_path: Path) -> None:
    adapter = random_adapter(llm.config, 4, seed=1, size=0.02)
    bare = tell(llm)
    llm.load_adapter("folder", write_peft(tmp_path / "folder", adapter))
    llm.load_adapter("file", write_lora_gguf(tmp_path / "file.gguf", adapter, llm.config, 0.04))
    assert {name: (loaded.rank, loaded.nbytes) for name, loaded in llm.adapters.items()} == {
        "folder": (4, adapter.nbytes),
        "file": (4, adapter.nbytes),
    }
    changed = tell(llm, "folder")
    assert changed != bare
    assert tell(llm, "file") == changed
    assert tell(llm) == bare
    streams = [
        llm.generate(PROMPT, temperature=0, max_tokens=40, adapter=name, stream=True)
        for name in ("folder", None, "file")
    ]
    texts = ["", "", ""]
    for chunks in zip(*streams, strict=False):
        texts = [text + chunk.text for text, chunk in zip(texts, chunks, strict=True)]
    assert all(whole.startswith(text) and text for whole, text in zip((changed, bare, changed), texts, strict=True))
    for stream in streams:
        stream.close()
    llm.unload_adapter("folder")
    with pytest.raises(RequestError, match="no adapter 'folder' is loaded; loaded: file"):
        tell(llm, "folder")
    with pytest.raises(CheckpointError, match="does not exist"):
        llm.load_adapter("folder", tmp_path / "nowhere")
    assert list(llm.adapters) == ["file"]
    assert tell(llm, "file") == changed


def test_the_text_is_that_of_llama_cpp(stories: Path, tmp_path: Path) -> None:
    try:
        program = find_program("llama-completion")
    except PunaError as error:
        pytest.skip(str(error))
    model = stories / "stories260K.gguf"
    with LLM.load(model, ops="reference") as llm:
        adapter = random_adapter(llm.config, 4, seed=1, size=0.02)
        path = write_lora_gguf(tmp_path / "adapter.gguf", adapter, llm.config, 0.04)
        llm.load_adapter("mine", path)
        found, bare = tell(llm, "mine"), tell(llm)
    options = "-n 40 --temp 0 -no-cnv --no-warmup --simple-io -c 256 -t 2"
    done = subprocess.run(
        [program, "-m", model, "--lora", path, "-p", PROMPT, *options.split()],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    expected = done.stdout.strip().removeprefix(PROMPT)
    length = min(len(found), len(expected))  # on a busy machine it may end without its last piece
    assert length > 80
    assert found[:length] == expected[:length] != bare[:length]


def test_the_bare_model_of_an_adapter_of_zeros(llm: LLM, tmp_path: Path) -> None:
    """As one that was never trained: B is zero."""
    adapter = random_adapter(llm.config, 2)
    for change in adapter.changes.values():
        change.b[:] = 0
    llm.load_adapter("zeros", write_peft(tmp_path / "adapter", adapter))
    assert tell(llm, "zeros") == tell(llm)
