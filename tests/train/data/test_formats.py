"""What rows mean, on real data sets and by hand; errors name the line and the field."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.chat.messages import Message
from puna.errors import DataError
from puna.train.data.dataset import Dataset, content_digest, open_dataset
from puna.train.data.examples import Continuation, Conversation, Labelled, Preference
from puna.train.data.formats import FORMATS, detect, format_named, parse_example

U, A, S = (
    (lambda text: Message("user", text)),
    (lambda text: Message("assistant", text)),
    (lambda t: Message("system", t)),
)


def parsed(**row: Any) -> Any:
    return parse_example(detect([row]), row)


@pytest.mark.parametrize(
    ("name", "columns", "form", "rows"),
    [
        ("alpaca_en_demo.json", {}, "alpaca", 999),
        ("alpaca_tiny.json", {}, "alpaca", 100),
        ("c4_demo.jsonl", {}, "text", 300),
        ("chat_tiny.json", {}, "sharegpt", 1),
        ("dpo_en_demo.json", {}, "sharegpt-preference", 300),
        ("glaive_toolcall_en_demo.json", {}, "sharegpt", 300),
        ("hh-rlhf-harmless-base-test.jsonl.gz", {}, "hh-rlhf", 2312),
        ("hh_rlhf_tiny.json", {}, "preference", 1),
        ("identity.json", {}, "alpaca", 91),
        ("instruct_tiny.json", {"output": "response"}, "alpaca", 2),
        ("kto_en_demo.json", {}, "messages-kto", 300),
        (
            "stack_exchange_paired_tiny.json",
            {"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
            "prompt-preference",
            25,
        ),
        ("wiki_demo.txt", {}, "text", 30),
        ("dataset_info.json:glaive_toolcall_en_demo", {}, "sharegpt", 300),
        ("dataset_info.json:dpo_en_demo", {}, "sharegpt-preference", 300),
        ("dataset_info.json:kto_en_demo", {}, "sharegpt-kto", 300),
        ("dataset_info.json:identity", {}, "alpaca", 91),
        ("dataset_info.json:wiki_demo", {}, "text", 30),
    ],
)
def test_real_sets_load_whole(name: str, columns: dict[str, str], form: str, rows: int, shared_data: Path) -> None:
    dataset = open_dataset(shared_data / "finetune" / name, columns=columns)
    assert dataset.format.name == form
    scan = dataset.scan()
    assert (len(scan.good), scan.bad) == (rows, [])


def test_pictures_are_refused_by_name(shared_data: Path) -> None:
    dataset = open_dataset(
        shared_data / "finetune" / "vqa_tiny.json", "completion", {"prompt": "input", "completion": "output"}
    )
    with pytest.raises(DataError, match=r"vqa_tiny\.json:2: image: this version trains on text only"):
        dataset[0]


def test_one_preference_of_the_real_set_by_hand(shared_data: Path) -> None:
    dataset = open_dataset(shared_data / "finetune" / "dpo_en_demo.json")
    row = json.loads((shared_data / "finetune" / "dpo_en_demo.json").read_text(encoding="utf-8"))[0]
    prompt = U(row["conversations"][0]["value"])
    assert dataset[0] == Preference(
        Conversation((prompt, A(row["chosen"]["value"])), (1,)),
        Conversation((prompt, A(row["rejected"]["value"])), (1,)),
    )


def test_alpaca() -> None:
    example = parsed(instruction="I", input="i", output="o", system="s", history=[["q", "a"]])
    assert example == Conversation((S("s"), U("q"), A("a"), U("I\ni"), A("o")), (2, 4))
    assert parsed(instruction="I", output="o", input=None) == Conversation((U("I"), A("o")), (1,))
    pair = parsed(instruction="I", chosen="x", rejected="y", history=[["q", "a"]])
    assert pair.chosen == Conversation((U("q"), A("a"), U("I"), A("x")), (3,))
    assert pair.rejected.messages[-1] == A("y")
    assert parsed(instruction="I", output="o", kto_tag=False) == Labelled(Conversation((U("I"), A("o")), (1,)), False)


def test_sharegpt_with_tools() -> None:
    tools = '[{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}]'
    call = '{"name": "f", "arguments": {"x": 1}}'
    turns = [("system", "s"), ("human", "q"), ("function_call", call), ("observation", "r"), ("gpt", "a")]
    example = parsed(conversations=[{"from": role, "value": text} for role, text in turns], tools=tools)
    calls = ({"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},)
    assert example.messages == (S("s"), U("q"), Message("assistant", None, calls), Message("tool", "r"), A("a"))
    assert example.trained == (2, 4)
    assert [tool["function"]["name"] for tool in example.tools] == ["f"]
    assert parsed(conversations=[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], tools="").tools == ()


def test_completions_and_texts_are_raw() -> None:
    assert parsed(prompt="p", completion="c") == Continuation("c", "p")
    assert parsed(text="t") == Continuation("t")
    assert parsed(prompt="p", completion="c", label="False") == Labelled(Continuation("c", "p"), False)
    messages = parsed(prompt=[{"role": "user", "content": "p"}], completion=[{"role": "assistant", "content": "c"}])
    assert messages == Conversation((U("p"), A("c")), (1,))
    assert parsed(prompt="p", chosen="x", rejected="y") == Preference(Continuation("x", "p"), Continuation("y", "p"))


def test_preferences_share_their_beginning() -> None:
    def m(*texts: str) -> list[dict[str, str]]:
        return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]

    expected = Preference(
        Conversation((U("a"), A("b"), U("c"), A("x")), (3,)), Conversation((U("a"), A("b"), U("c"), A("y")), (3,))
    )
    chosen, rejected = m("a", "b", "c", "x"), m("a", "b", "c", "y")
    assert parsed(chosen=chosen, rejected=rejected) == expected
    assert parsed(prompt="a", chosen=chosen, rejected=rejected) == expected
    assert parsed(prompt=m("a", "b", "c"), chosen=chosen[3:], rejected=rejected[3:]) == expected
    assert parsed(messages=m("a", "b", "c"), chosen=chosen[3], rejected=rejected[3]) == expected
    hh = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    assert parsed(chosen=f"{hh}x", rejected=f"{hh}y") == expected
    assert len({content_digest(parsed(chosen=chosen, rejected=rejected)), content_digest(expected)}) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "", "output": "o"}, "instruction and input are both empty"),
        ({"instruction": "i", "output": " "}, "output is empty"),
        ({"instruction": 3, "output": "o"}, "instruction must be text, found int"),
        ({"instruction": "i", "output": "o", "history": [["a"]]}, r"history\[0\] must be \[question, answer\]"),
        ({"conversations": []}, "conversations must be a list of messages, found an empty list"),
        ({"conversations": [{"value": "x"}]}, r"conversations\[0\] says not who speaks"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, r"conversations\[0\]\.from must be one of"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, r"conversations\[0\]\.from must be one of"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "no assistant message to learn"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, r"conversations\[0\]\.value must be a call"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "tools": "{"}, "tools must be a list"),
        ({"messages": [{"role": "assistant", "content": 3}]}, r"messages\[0\]\.content must be text"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": 2}]}, r"messages\[0\]\.weight must be 0 or 1"),
        (
            {"messages": [{"role": "assistant", "content": "x"}], "tools": [{"name": "a b"}]},
            r"tools\[0\]\.function\.name",
        ),
        ({"prompt": "p", "completion": ""}, "completion is empty"),
        ({"prompt": "p", "completion": [{"role": "assistant", "content": "x"}]}, "must both be text, or both"),
        ({"prompt": "p", "chosen": "x", "rejected": "x"}, "are the same"),
        ({"prompt": "p", "completion": "c", "label": 1}, "label must be true"),
        ({"chosen": "\n\nHuman: a", "rejected": "b"}, r"rejected must begin with"),
        ({"text": "\n"}, "text is empty"),
    ],
)
def test_a_bad_row_names_its_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parsed(**row)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["", "human", "gpt", "assistant", "{", '{"name": "f"}', "[]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "weight", "tool_calls", "name", "function", "type"]),
            inner,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    form=st.sampled_from(list(FORMATS.values())),
    values=st.dictionaries(st.sampled_from(["tools", "system", "history", "input", "label", "kto_tag"]), VALUES),
    data=st.data(),
)
def test_a_hostile_row_is_an_example_or_an_error(form: Any, values: dict[str, Any], data: st.DataObject) -> None:
    row = {**values, **{field: data.draw(VALUES) for field in form.fields}}
    with suppress(DataError):
        assert 0 <= content_digest(parse_example(form, row)) < 2**64


def test_unknown_formats_and_fields(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"did you mean sharegpt\?"):
        format_named("sharegtp")
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: the rows have the fields answer, question, which no format has"):
        open_dataset(path)
    dataset = open_dataset(path, columns={"prompt": "question", "completion": "answer"})
    assert dataset[0] == Continuation("a", "q")
    with pytest.raises(DataError, match="no field reply"):
        open_dataset(path, "completion", {"completion": "reply"})[0]


def saved(path: Path, rows: list[dict[str, Any]]) -> Dataset:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_dataset(path)


def test_bad_rows_are_counted_and_named(tmp_path: Path) -> None:
    dataset = saved(tmp_path / "a.jsonl", [{"text": "a"}, {"text": 3}, {"text": "b"}, {"texts": "c"}])
    scan = dataset.scan()
    assert scan.good.tolist() == [0, 2]
    assert [bad.message for bad in scan.bad] == [
        "a.jsonl:2: text must be text, found int",
        "a.jsonl:4: the field text is missing",
    ]
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*2 of 4 rows are bad.*--skip-bad 2"):
        dataset.checked(skip_bad=1)
    assert dataset.checked(skip_bad=2).good.tolist() == [0, 2]
    with pytest.raises(DataError, match="no row to train on"):
        saved(tmp_path / "b.jsonl", [{"text": ""}]).checked(skip_bad=1)


def test_duplicates_are_found_whatever_their_spelling(tmp_path: Path) -> None:
    texts = ["a", "b", "a", "c", "b", "a"]
    scan = saved(tmp_path / "a.jsonl", [{"text": text, "id": i} for i, text in enumerate(texts)]).scan()
    assert [group.tolist() for group in scan.duplicates()] == [[0, 2, 5], [1, 4]]
    assert saved(tmp_path / "b.jsonl", [{"text": "a"}, {"text": "b"}]).scan().duplicates() == []
    assert saved(tmp_path / "c.jsonl", [{"text": ""}]).scan().duplicates() == []


@settings(max_examples=25, deadline=None)
@given(share=st.floats(0, 1), removed=st.integers(0, 99), order=st.randoms())
def test_a_split_stays_when_rows_come_go_and_move(
    share: float, removed: int, order: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    texts = [f"text {i}" for i in range(100)]
    changed = [text for text in texts if text != f"text {removed}"] + ["new"]
    order.shuffle(changed)

    def held_out(texts: list[str]) -> set[str]:
        dataset = saved(tmp_path_factory.getbasetemp() / "split.jsonl", [{"text": text} for text in texts])
        train, validation = dataset.scan().split(share)
        assert sorted([*train, *validation]) == list(range(len(texts)))
        return {texts[number] for number in validation}

    assert held_out(texts) - {f"text {removed}"} == held_out(changed) - {"new"}


def test_a_split_has_about_its_share(tmp_path: Path) -> None:
    scan = saved(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(4000)]).scan()
    assert abs(len(scan.split(0.1)[1]) - 400) < 100  # five standard deviations
    assert len(scan.split(0.0)[1]) == 0


@pytest.mark.parametrize("change", [lambda t: [*t, "d"], lambda t: t[1:], lambda t: t[::-1], lambda t: ["x", *t[1:]]])
def test_the_digest_tells_changed_data(change: Callable[[list[str]], list[str]], tmp_path: Path) -> None:
    def digest(texts: list[str]) -> str:
        return saved(tmp_path / "a.jsonl", [{"text": text} for text in texts]).scan().digest

    assert digest(["a", "b", "c"]) == digest(["a", "b", "c"])
    assert digest(["a", "b", "c"]) != digest(change(["a", "b", "c"]))
