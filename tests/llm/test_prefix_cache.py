"""What a second turn, and a second process, save: the real SmolLM2 through ``LLM.chat``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from puna.llm import LLM, Completion
from puna.llm.identity import model_identity
from puna.store import Store, import_file, resolve

FIRST = [{"role": "user", "content": f"Read this list: {', '.join(map(str, range(60)))}. What is 2+2?"}]
ANSWER = {"temperature": 0, "max_tokens": 24, "top_logprobs": 2}


def second(answer: Completion) -> list[dict[str, str]]:
    return [*FIRST, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "And 3+3?"}]


def common_blocks(llm: LLM, computed: list[int], prompt: list[int]) -> int:
    """Tokens of the whole blocks that both begin with."""
    same = 0
    while same < min(len(computed), len(prompt) - 1) and computed[same] == prompt[same]:
        same += 1
    return same // 32 * 32


def test_the_second_turn_of_a_chat_starts_at_once(smollm2_path: Path) -> None:
    with LLM.load(smollm2_path) as llm:
        one = llm.chat(FIRST, **ANSWER)
        two = llm.chat(second(one), **ANSWER)
        computed = [*llm.prompt(FIRST).ids, *one.token_ids]
        expected = common_blocks(llm, computed, llm.prompt(second(one)).ids)
        llm.engine = LLM(llm.model, llm.tokenizer).engine
        alone = llm.chat(second(one), **ANSWER)
    assert one.timings.cached_tokens == 0
    assert two.timings.cached_tokens == expected >= len(computed) - 32
    assert two.timings.prompt_tokens - expected < 64
    assert alone.timings.cached_tokens == 0
    assert (two.token_ids, two.logprobs) == (alone.token_ids, alone.logprobs)


def test_the_next_load_finds_it_on_disk(smollm2_path: Path, tmp_path: Path) -> None:
    def chat(speculative: str | None = None) -> tuple[Completion, Completion]:
        with LLM.load(smollm2_path, cache_dir=tmp_path / "cache", speculative=speculative) as llm:
            one = llm.chat(FIRST, **ANSWER)
            return one, llm.chat(second(one), **ANSWER)

    before, after, drafted = chat(), chat(), chat("ngram")
    prompts = [turn.timings.prompt_tokens for turn in before]
    assert before[0].timings.cached_tokens == 0
    for turns in (after, drafted):
        assert [turn.timings.cached_tokens for turn in turns] == [(n - 1) // 32 * 32 for n in prompts]
        for old, new in zip(before, turns, strict=True):
            assert (new.token_ids, new.logprobs) == (old.token_ids, old.logprobs)


def test_a_path_is_known_by_its_files(tmp_path: Path) -> None:
    def identity(path: Path) -> str:
        return model_identity(resolve(path))

    folder = tmp_path / "model"
    folder.mkdir()
    one, two = folder / "m-00001-of-00002.gguf", folder / "m-00002-of-00002.gguf"
    for part in (one, two):
        part.write_bytes(bytes(3_000_000))
        os.utime(part, (0, 0))
    seen = {identity(one)}
    assert identity(two) in seen
    (folder / "notes.txt").write_text("no weights")
    assert identity(one) in seen
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert identity(copy / one.name) in seen, "wherever it lies"
    with two.open("r+b") as file:  # the same name, size and time, other weights
        file.write(b"\x01" * 3_000_000)
    os.utime(two, (0, 0))
    assert identity(one) not in seen
    two.write_bytes(bytes(3_000_000))
    os.utime(two, (1, 1))
    assert identity(one) not in seen


def test_names_of_one_content_share(smollm2_path: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    for name in ("one", "two"):
        import_file(smollm2_path, name, store=store)
    assert model_identity(resolve("one", store)) == model_identity(resolve("two", store))
    assert model_identity(resolve("one", store)) != model_identity(resolve(smollm2_path))
