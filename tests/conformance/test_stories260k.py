"""Karpathy's 260-thousand-parameter Llama 2: the greedy story that llama2.c's documentation prints."""

from pathlib import Path

import pytest

from puna.llm import LLM

FILES = ["stories260K.gguf", "hf"]


@pytest.mark.parametrize("ops", ["reference", "native"])
@pytest.mark.parametrize("file", FILES)
def test_greedy_story(shared_data: Path, file: str, ops: str) -> None:
    if ops == "native":
        pytest.importorskip("puna.ops.native_ops")
    folder = shared_data / "weights" / "stories260K"
    expected = (folder / "expected_greedy.txt").read_text(encoding="utf-8").strip("\n")
    with LLM.load(folder / file, ops=ops) as llm:
        story = llm.generate("", temperature=0, max_tokens=256).text
    length = min(len(story), len(expected))
    assert length > 400
    assert (
        story.lstrip()[:length] == expected[:length] if ops == "reference" else story.lstrip()[:300] == expected[:300]
    )
