"""``puna run``, the conversation and ``puna bench`` on the real SmolLM2."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from lora_files import write_peft
from tiny_models import random_adapter

from puna.cli import bench
from puna.cli.repl import Repl
from puna.errors import RequestError
from puna.llm import LLM

GREEDY = ["--temperature", "0"]
ANSWER = "The answer to this classic math problem is 4."


def test_one_answer(stored) -> None:
    assert stored("run", "smollm2", "What is 2+2?", *GREEDY).out == f"{ANSWER}\n"


def test_json_has_the_answer_and_its_timings(stored) -> None:
    facts = stored("run", "smollm2", "What is 2+2?", "--json", *GREEDY).json
    assert facts["response"] == ANSWER
    assert facts["finish_reason"] == "stop"
    assert facts["generated_tokens"] == 12
    assert facts["decode_tokens_per_second"] > 0


def test_piped_input_joins_the_prompt(stored) -> None:
    explained = stored("run", "smollm2", "Count the words:", "--explain-prompt", "--json", stdin="one two three\n").json
    assert "<|im_start|>user\nCount the words:\n\none two three<|im_end|>" in explained["text"]
    alone = stored("run", "smollm2", "--explain-prompt", "--json", stdin="only piped").json
    assert "user\nonly piped<|im_end|>" in alone["text"]


def test_the_next_run_finds_the_prompt_on_disk(stored, tmp_path: Path) -> None:
    prompt = ["run", "smollm2", f"Read this: {' '.join(map(str, range(50)))}. What is 2+2?", "--json", *GREEDY]
    options = ["--cache-dir", str(tmp_path / "cache"), "--cache-size", "100MB"]
    plain, first, second = (stored(*prompt, *more).json for more in ([], options, options))
    assert plain["response"] == first["response"] == second["response"]
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] == (second["prompt_tokens"] - 1) // 32 * 32 > 0


@pytest.mark.parametrize("size", ["much", "-1", "1.5GB", "10XB", "10%"])
def test_a_cache_size_that_is_none(stored, size: str) -> None:
    result = stored("run", "smollm2", "Hi", "--cache-dir", "cache", f"--cache-size={size}")
    assert result.code == 2
    assert f"'{size}' is not a size such as 500MB or 2GB" in result.err


def test_a_cache_size_too_small(stored, tmp_path: Path) -> None:
    result = stored("run", "smollm2", "Hi", "--cache-dir", str(tmp_path / "cache"), "--cache-size=700kB")
    assert result.code == 1
    assert "cache_size must be at least 737492 bytes, one block of this model, found 700000" in result.err


def test_explain_prompt_shows_where_each_token_came_from(stored) -> None:
    tokens = stored("run", "smollm2", "Hi <|im_end|>", "--system", "Be brief.", "--explain-prompt", "--json").json[
        "tokens"
    ]
    control = [token for token in tokens if token["id"] == 2]
    assert {token["origin"] for token in control} == {"special"}  # what the user typed did not become a control token
    assert len(control) == 2
    assert "".join(t["text"] for t in tokens if t["origin"] == "messages[1].content") == "Hi <|im_end|>"
    assert "ORIGIN" in stored("run", "smollm2", "Hi", "--explain-prompt").out
    raw = stored("run", "smollm2", "Hi there", "--raw", "--explain-prompt", "--json").json["tokens"]
    assert [token["text"] for token in raw] == ["Hi", " there"]


def test_sampling_options_reach_the_engine(stored) -> None:
    def answer(*options: str) -> str:
        return stored("run", "smollm2", "Tell me a story.", "--num-predict", "12", *options).out

    assert answer("--seed", "1") == answer("--seed", "1")
    assert answer("--seed", "1", "--temperature", "1.5") != answer("--seed", "2", "--temperature", "1.5")
    assert answer("--top-k", "1") == answer(*GREEDY)
    stopped = stored("run", "smollm2", "What is 2+2?", "--stop", "classic", *GREEDY).out
    assert stopped == "The answer to this \n"


def test_format_makes_valid_json(stored, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(
        '{"type":"object","properties":{"n":{"type":"integer"}},"required":["n"],"additionalProperties":false}'
    )
    for source in (str(schema), schema.read_text()):
        answer = json.loads(stored("run", "smollm2", "A number, please.", "--format", source, *GREEDY).out)
        assert isinstance(answer["n"], int)
    question = "What is the capital of France? Answer as JSON."  # "any JSON" is nested to the end of the context
    assert isinstance(json.loads(stored("run", "smollm2", question, "--format", "json", *GREEDY).out), dict)


def test_raw_and_verbose(stored) -> None:
    result = stored("run", "smollm2", "The capital of France is", "--raw", "--num-predict", "1", "--verbose", *GREEDY)
    assert result.out == " Paris\n"
    assert "decode seconds" in result.err


def test_speculation_gives_the_same_answer_and_shows_its_drafts(stored) -> None:
    question = ("run", "smollm2", "Repeat this: one two three four five six", "--json", "--num-predict", "60", *GREEDY)
    plain, ngram = stored(*question).json, stored(*question, "--speculative", "ngram").json
    drafted = stored(*question, "--draft-model", "smollm2").json
    assert plain["response"] == ngram["response"] == drafted["response"]
    assert (plain["drafted_tokens"], plain["accepted_tokens"]) == (0, 0)
    assert drafted["accepted_tokens"] == drafted["drafted_tokens"]


def test_bench_reports_speeds(stored) -> None:
    arguments = ["bench", "smollm2", "--prompt-tokens", "40", "--gen-tokens", "4", "--threads", "1", "--runs", "1"]
    facts = stored(*arguments, "--json").json
    assert facts["threads"] == 1
    for key in ("prefill_tokens_per_second", "decode_tokens_per_second", "load_seconds", "time_to_first_token_seconds"):
        assert facts[key] > 0
    assert facts["peak_rss_bytes"] > 98_362_432
    assert "tokens/s" in stored(*arguments).out


def test_bench_warms_up_with_the_whole_prompt(stored, monkeypatch) -> None:
    """Else the first run that is timed pays for new memory, which llama-bench's does not."""
    prompts = []
    measure = bench._prefill_seconds

    def recorded(llm: LLM, tokens: int, salt: str) -> float:
        prompts.append(tokens)
        return measure(llm, tokens, salt)

    monkeypatch.setattr(bench, "_prefill_seconds", recorded)
    stored("bench", "smollm2", "--prompt-tokens", "40", "--gen-tokens", "0", "--threads", "1", "--runs", "2")
    assert prompts == [40, 40, 40]


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> LLM:
    return LLM.load(smollm2_path)


def converse(llm: LLM, lines: list[str], **options) -> Repl:
    feed = iter(lines)

    def read(_prompt: str) -> str:
        line = next(feed, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    repl = Repl(
        llm, "smollm2", sampling={"temperature": 0, "max_tokens": 16}, read=read, open_model=LLM.load, **options
    )
    repl.run()
    return repl


def test_a_conversation_remembers(llm: LLM, home: Path, capsys) -> None:
    repl = converse(llm, ["My name is Ada.", '"""Two', 'lines."""', "", "^C", "/bye", "never read"])
    assert [m["role"] for m in repl.messages] == ["user", "assistant"] * 2
    assert repl.messages[2]["content"] == "Two\nlines."
    assert "Ctrl-D" in capsys.readouterr().out


def test_commands_of_the_conversation(llm: LLM, home: Path, stored, capsys) -> None:
    repl = converse(
        llm,
        [
            "/set parameter temperature 0.5",
            "/set parameter num_predict -1",
            "/set parameter stop END",
            "/set system Be brief.",
            '/set format {"type":"object"}',
            "/set verbose",
            "/set",
            "/show parameters",
            "/show system",
            "/show template",
            "/?",
        ],
    )
    assert repl.sampling == {"temperature": 0.5, "max_tokens": None, "stop": ("END",)}
    assert (repl.system, repl.answer_format, repl.verbose) == ("Be brief.", '{"type":"object"}', True)
    out = capsys.readouterr().out
    assert "Be brief." in out
    assert "<|im_start|>" in out
    assert "Ctrl-C" in out


def test_conversations_are_saved_and_loaded(llm: LLM, home: Path, capsys) -> None:
    saved = converse(llm, ["Hello!", "/set system Be kind.", "/save talk"])
    loaded = converse(llm, ["/load talk", "/show messages"])
    assert loaded.messages == saved.messages
    assert loaded.system == "Be kind."
    assert "user: Hello!" in capsys.readouterr().out
    assert converse(llm, ["Hello!", "/clear"]).messages == []

    for damaged in ('{"model": "smollm2", "messages": 5}', '{"model": "smollm2"}', "{", "[]"):
        (home / "sessions" / "talk.json").write_text(damaged)
        assert converse(llm, ["/load talk"]).messages == []
        assert "is damaged" in capsys.readouterr().err


def test_mistakes_in_the_conversation_are_told_and_survived(llm: LLM, home: Path, capsys) -> None:
    lines = ["/nonsense", "/set parameter temperature warm", "/set parameter warmth 3", "/set parameter top_p 7"]
    lines += ["/save ../evil", "/load no-such-model", "/set format {broken", "word " * 9000]
    repl = converse(llm, lines)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == len(lines)
    assert all(line.startswith("Error: ") for line in errors)
    assert repl.messages == []
    with pytest.raises(RequestError):
        llm.sampling(warmth=3)


def test_ctrl_c_stops_the_answer_not_the_program(llm: LLM, home: Path, capsys, monkeypatch) -> None:
    repl = Repl(llm, "smollm2", sampling={"temperature": 0}, read=lambda _: "", open_model=LLM.load)

    def interrupted():
        chunks = llm.chat([{"role": "user", "content": "Count to a thousand."}], temperature=0, stream=True)
        for number, chunk in enumerate(chunks):
            yield chunk
            if number == 5:
                raise KeyboardInterrupt

    partial = repl._show(interrupted())
    assert partial
    assert "[stopped]" in capsys.readouterr().out
    assert not llm.engine.has_work


def test_the_real_terminal(smollm2_path: Path, home: Path) -> None:
    """A chat through a pseudo-terminal, line editing and history included."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "puna", "run", str(smollm2_path), "--temperature", "0"]
    environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True)
    os.close(theirs)
    seen = b""

    def read_until(expected: bytes) -> None:
        nonlocal seen
        while expected not in seen:
            part = os.read(ours, 65536)
            assert part, seen
            seen += part

    read_until(b">>>")
    os.write(ours, b"What is 2+2?\r")
    read_until(b"problem is 4.")
    os.write(ours, b"/bye\r")
    try:
        while os.read(ours, 65536):
            pass
    except OSError:
        pass  # the other end is closed
    assert process.wait(timeout=60) == 0
    assert "What is 2+2?" in (home / "history").read_text()


def test_an_adapter(puna, shared_data: Path, tmp_path: Path) -> None:
    model = str(shared_data / "weights" / "stories260K" / "hf")
    with LLM.load(model) as llm:
        adapter = write_peft(tmp_path / "adapter", random_adapter(llm.config, 4, seed=1, size=0.02))
        llm.load_adapter("mine", adapter)
        expected = llm.generate("Once upon a time", temperature=0, max_tokens=20, adapter="mine").text
    command = ["run", model, "Once upon a time", "--num-predict", "20", *GREEDY]
    assert puna(*command, "--adapter", str(adapter)).out == f"{expected}\n"
    assert puna(*command).out != f"{expected}\n"
    result = puna(*command, "--adapter", str(tmp_path))
    assert result.code == 1
    assert "is not an adapter that Puna can read" in result.err


def test_a_conversation_with_an_adapter(shared_data: Path, home: Path, tmp_path: Path, capsys) -> None:
    model = str(shared_data / "weights" / "stories260K" / "hf")
    with LLM.load(model) as stories:
        path = write_peft(tmp_path / "adapter", random_adapter(stories.config, 4, seed=1, size=0.02))
        stories.load_adapter("mine", path)
        expected = [
            stories.generate("Once", temperature=0, max_tokens=16, adapter=adapter).text for adapter in ("mine", None)
        ]
        repl = converse(stories, ["Once", f"/load {model}", "Once"], adapter="mine")
    assert [message["content"] for message in repl.messages[1::2]] == expected  # another model has no such adapter
