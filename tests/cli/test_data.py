"""``puna data check``: what it says of good and bad files."""

import json
from pathlib import Path
from typing import Any

import pytest


def saved(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def exchange(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_bad_rows_are_named_and_fail(puna, tmp_path: Path) -> None:
    bad = {"messages": [{"role": "robot", "content": "x"}]}
    path = saved(tmp_path / "a.jsonl", [exchange("a", "b"), "{", bad, exchange("a", "b")])
    result = puna("data", "check", path)
    assert result.code == 1
    assert "a.jsonl: 2 of 4 rows can be used (format messages)" in result.out
    assert "a.jsonl:2: the row is not JSON" in result.out
    assert "a.jsonl:3: messages[0].role must be one of" in result.out
    assert "a.jsonl:1, a.jsonl:4" in result.out
    assert result.err == (
        "Error: 2 of 4 rows of a.jsonl cannot be used; mend them, or leave them out with --skip-bad 2\n"
    )
    assert puna("data", "check", path, "--skip-bad", "1").code == 1
    accepted = puna("data", "check", path, "--skip-bad", "2", "--json")
    assert (accepted.code, accepted.err) == (0, "")
    assert [accepted.json[name] for name in ("rows", "usable", "bad", "duplicates")] == [4, 2, 2, 1]
    assert len(accepted.json["errors"]) == 2


def test_tokens_and_what_is_learnt(stored, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jsonl", [exchange("What is 2+2?", "Four."), exchange("Hi", "\x1b[31mred " * 200)])
    report = stored("data", "check", path, "--model", "smollm2", "--length", "100", "--json").json
    (document,) = report["preview"][0]["documents"]
    assert [stretch["text"] for stretch in document if stretch["trained"]] == ["Four.<|im_end|>"]
    assert "".join(stretch["text"] for stretch in document).endswith(
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>"
    )
    assert report["longer"] == {"than": 100, "documents": 1}
    assert report["length"]["p50"] < 100 < report["length"]["p95"] == report["length"]["max"]
    assert sum(step["documents"] for step in report["histogram"]) == report["documents"] == 2
    shown = stored("data", "check", path, "--model", "smollm2", "--preview", "2").out
    assert "Four.<|im_end|>" in shown
    assert "red" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--column", "output"], "'output' is not FIELD=COLUMN"),
        (["--length", "9"], "needs --model"),
        (["--format", "alpacca"], "did you mean alpaca?"),
        (["--format", "text"], "a.jsonl"),
    ],
)
def test_misuse_is_told(options: list[str], message: str, puna, tmp_path: Path) -> None:
    result = puna("data", "check", saved(tmp_path / "a.jsonl", [exchange("a", "b")]), *options)
    assert result.code in (1, 2)
    assert message in result.err
    assert "Traceback" not in result.err


def test_a_row_that_the_template_cannot_show_is_a_bad_row(stored, tmp_path: Path) -> None:
    rows = [exchange("a", "b"), {"messages": [{"role": "assistant", "content": "first"}]}]
    result = stored("data", "check", saved(tmp_path / "a.jsonl", rows), "--model", "smollm2")
    assert result.code == 1
    assert "a.jsonl:2: messages[0] is the assistant's" in result.out
