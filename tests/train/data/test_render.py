"""Loss masks: what is trained is what the assistant said and the token that ends its turn, behind the prompt served."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.chat.builtin import BUILTIN
from puna.chat.go_template import chat_template
from puna.chat.messages import Message
from puna.chat.prompt import render_prompt
from puna.chat.template import ChatTemplate
from puna.errors import DataError, TemplateError
from puna.tokenizer import Tokenizer, load_tokenizer
from puna.train.data.conversations import conversation, parse_tools, parse_turns
from puna.train.data.examples import Continuation, Conversation
from puna.train.data.formats import detect, parse_example
from puna.train.data.render import Renderer
from puna.train.data.tokens import Tokens

TEMPLATES = [
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use.jinja",
    "SmolLM2-135M-Instruct.jinja",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja",
    "llama3.jinja",
    "llama3_2_vision.jinja",
    "llama4.jinja",
    "meta-llama-Llama-3.1-8B-Instruct.jinja",
    "meta-llama-Llama-3.2-3B-Instruct.jinja",
    "meta-llama-Llama-3.3-70B-Instruct.jinja",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "City"}}},
    },
}
CALL = {"type": "function", "id": "call00001", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
DATE = {"date_string": "26 Jul 2024"}


@pytest.fixture(scope="module")
def llama3(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "tokenizers" / "llama3.1.tokenizer.json")


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def llama2(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "tokenizers" / "llama2.tokenizer.model")


CONTROL_TOKENS = {
    "llama4": ["<|header_start|>", "<|header_end|>", "<|eot|>"],
    "deepseek": ["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"],
    "chatml": ["<|im_start|>", "<|im_end|>"],
}


@pytest.fixture(scope="module")
def tokenizers(shared_data: Path, llama3: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Each template with a vocabulary that has its control tokens: Llama 3.1's, with some reserved ones respelled."""
    made = {"llama3": llama3}
    for family, spelled in CONTROL_TOKENS.items():
        source = (shared_data / "tokenizers" / "llama3.1.tokenizer.json").read_text(encoding="utf-8")
        for number, text in enumerate(spelled):
            source = source.replace(f'"<|reserved_special_token_{number + 20}|>"', f'"{text}"')
        path = tmp_path_factory.mktemp(family) / "tokenizer.json"
        path.write_text(source, encoding="utf-8")
        made[family] = load_tokenizer(path)
    return {name: made[family_of(name)] for name in TEMPLATES}


def family_of(name: str) -> str:
    if "Hermes" in name or "SmolLM2" in name:
        return "chatml"
    return next((family for family in ("llama4", "deepseek") if family in name), "llama3")


def renderer_of(shared_data: Path, name: str, tokenizer: Tokenizer, **options: Any) -> Renderer:
    source = (shared_data / "templates" / "jinja" / name).read_text(encoding="utf-8")
    template = ChatTemplate.for_tokenizer(source, tokenizer)
    return Renderer(tokenizer, template, variables={**DATE, **options.pop("variables", {})}, **options)


def chat(*messages: dict[str, Any], tools: Any = None) -> Conversation:
    return conversation(parse_turns(list(messages), "messages"), parse_tools(tools))


def trained_texts(tokenizer: Tokenizer, documents: list[Tokens]) -> list[str]:
    """Each stretch of trained tokens, decoded."""
    found = []
    for document in documents:
        stretch: list[int] = []
        for token, trained in zip([*document.ids.tolist(), 0], [*document.trained.tolist(), False], strict=True):
            if trained:
                stretch.append(token)
            elif stretch:
                found.append(b"".join(map(tokenizer.token_bytes, stretch)).decode())
                stretch = []
    return found


USER, ANSWER, MORE, LAST = "What is 2+2?", "It is 4.", "And <|eot_id|> 3+3?", "Six, 六 👍🏽."


@pytest.mark.parametrize("name", [name for name in TEMPLATES if "DeepSeek" not in name])
def test_exactly_the_answers_and_their_ends_are_trained(
    name: str, shared_data: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[name]
    sample = chat(
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": USER},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": MORE},
        {"role": "assistant", "content": LAST},
        # Hermes' tool template has no form without tools.
        tools=[TOOL] if "Hermes" in name else None,
    )
    end = {"llama4": "<|eot|>", "chatml": "<|im_end|>"}.get(family_of(name), "<|eot_id|>")
    documents = renderer_of(shared_data, name, tokenizer).render(sample)
    assert len(documents) == 1
    assert trained_texts(tokenizer, documents) == [ANSWER + end, LAST + end]
    last = renderer_of(shared_data, name, tokenizer, train_on="last").render(sample)
    assert trained_texts(tokenizer, last) == [LAST + end]
    everything = renderer_of(shared_data, name, tokenizer, train_on="everything").render(sample)
    assert everything[0].trained[1:].all()
    assert everything[0].ids.tolist() == documents[0].ids.tolist()


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_follows_what_the_vectors_say_is_served(
    name: str, shared_data: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    """Every conversation of the vectors that asks for an answer, with one: its document is transformers' prompt, as
    ids, and then the answer."""
    tokenizer = tokenizers[name]
    renderer = renderer_of(shared_data, name, tokenizer, train_on="last")
    checked = 0
    for case in json.loads((shared_data / "templates" / "vectors-jinja.json").read_text(encoding="utf-8"))["cases"]:
        messages = case["messages"]
        if case["template"] != name or not case["add_generation_prompt"] or "expected" not in case:
            continue
        # Control tokens that users spell are text to Puna; conversations with tools are shown as the server shows them.
        if case["tools"] or "tool_calls" in json.dumps(messages) or "<|eot_id|>" in json.dumps(messages):
            continue
        reasoning = "DeepSeek" in name
        answer = "<think>\nHm.\n</think>\n\nYes." if reasoning else "Yes."
        try:
            (document,) = renderer.render(chat(*messages, {"role": "assistant", "content": answer}))
        except TemplateError:
            continue  # the template wants tools, or roles in turn
        prompt = tokenizer.encode(case["expected"], parse_special=True)
        if prompt[0] != tokenizer.bos_id:
            prompt.insert(0, tokenizer.bos_id or 0)  # this vocabulary wants one
        start = int(document.trained.argmax())
        assert document.ids[:start].tolist() == prompt
        text = tokenizer.decode(document.ids[start:]).decode()
        assert text.startswith("Hm.\n</think>\n\nYes.<" if reasoning else "Yes.<")
        assert document.ids[-1] in tokenizer.special_ids
        assert document.trained[start:].all()
        checked += 1
    assert checked >= 1 or "Hermes" in name


def test_a_template_that_drops_reasoning_gives_each_turn_a_document(
    shared_data: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    name = "deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja"
    tokenizer = tokenizers[name]
    renderer = renderer_of(shared_data, name, tokenizer)
    sample = chat(
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\none\n</think>\n\nA."},
        {"role": "user", "content": "b"},
        {"role": "assistant", "reasoning_content": "two", "content": "B."},
    )
    documents = renderer.render(sample)
    shown = [tokenizer.decode(document.ids).decode() for document in documents]
    assert shown == [
        "<|begin_of_text|><｜User｜>a<｜Assistant｜><think>\none\n</think>\n\nA.<｜end▁of▁sentence｜>",
        "<|begin_of_text|><｜User｜>a<｜Assistant｜>\n\nA.<｜end▁of▁sentence｜><｜User｜>b<｜Assistant｜><think>\ntwo\n</think>\n\n"
        "B.<｜end▁of▁sentence｜>",
    ]
    assert trained_texts(tokenizer, documents) == [
        "one\n</think>\n\nA.<｜end▁of▁sentence｜>",
        "two\n</think>\n\nB.<｜end▁of▁sentence｜>",
    ]
    with pytest.raises(DataError, match=r"messages\[1\].*begins every answer with '<think>"):
        renderer.render(chat({"role": "user", "content": "a"}, {"role": "assistant", "content": "no reasoning"}))


@pytest.mark.parametrize("shown", ["m.content.split('</think>')[-1]", "m.content"])
def test_reasoning_is_learnt_also_where_the_template_leaves_it_out(llama3: Tokenizer, shown: str) -> None:
    source = "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ SHOWN }}<|eot_id|>{% endfor %}"
    source += "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
    template = ChatTemplate.for_tokenizer(source.replace("SHOWN", shown), llama3)
    user = {"role": "user", "content": "a"}
    expected = ["<think>\nwhy\n</think>\n\nb<|eot_id|>"]
    for answer in ({"content": "<think>\nwhy\n</think>\n\nb"}, {"content": "b", "reasoning_content": "why"}):
        documents = Renderer(llama3, template).render(chat(user, {"role": "assistant", **answer}))
        assert trained_texts(llama3, documents) == expected


@pytest.mark.parametrize("name", [name for name in TEMPLATES if "DeepSeek" not in name])
def test_calls_are_trained_and_their_results_are_not(
    name: str, shared_data: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[name]
    sample = chat(
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call00001", "content": '{"temp": 21}'},
        {"role": "assistant", "content": "21 degrees."},
        tools=[TOOL],
    )
    renderer = renderer_of(shared_data, name, tokenizer)
    call, words = trained_texts(tokenizer, renderer.render(sample))
    assert "get_weather" in call
    assert "Paris" in call
    assert "temp" not in call
    assert words.startswith("21 degrees.<")


def test_parallel_calls_become_turns_where_the_template_takes_one(
    shared_data: Path, tokenizers: dict[str, Tokenizer]
) -> None:
    name = "meta-llama-Llama-3.1-8B-Instruct.jinja"
    other = {**CALL, "id": "call00002", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    sample = chat(
        {"role": "user", "content": "Paris and Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, other]},
        {"role": "tool", "tool_call_id": "call00001", "content": "1"},
        {"role": "tool", "tool_call_id": "call00002", "content": "2"},
        {"role": "assistant", "content": "Cold."},
        tools=[TOOL],
    )
    texts = trained_texts(tokenizers[name], renderer_of(shared_data, name, tokenizers[name]).render(sample))
    assert texts == [
        '{"name": "get_weather", "parameters": {"city": "Paris"}}<|eot_id|>',
        '{"name": "get_weather", "parameters": {"city": "Rome"}}<|eot_id|>',
        "Cold.<|eot_id|>",
    ]


def test_templates_in_gos_language(shared_data: Path, llama3: Tokenizer) -> None:
    def renderer(name: str) -> Renderer:
        source = (shared_data / "templates" / "gotmpl" / f"{name}.gotmpl").read_text(encoding="utf-8")
        return Renderer(llama3, chat_template(source, llama3))

    messages = [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": USER},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": MORE},
        {"role": "assistant", "content": LAST},
    ]
    llama = renderer("llama3-instruct")
    (document,) = llama.render(chat(*messages))
    assert trained_texts(llama3, [document]) == [f"{ANSWER}<|eot_id|>", f"{LAST}<|eot_id|>"]
    served = render_prompt(llama._chat_template, llama3, messages[:4]).ids
    assert document.ids[: len(served)].tolist() == served
    with pytest.raises(DataError, match="in Go's language, does not end this answer"):
        renderer("alpaca").render(chat(*messages))


def test_weights_choose_the_messages(llama3: Tokenizer) -> None:
    renderer = Renderer(llama3, ChatTemplate.for_tokenizer(BUILTIN["llama3"], llama3))
    sample = chat(
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bad", "weight": 0},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "good", "weight": 1},
    )
    assert trained_texts(llama3, renderer.render(sample)) == ["good<|eot_id|>"]


PARTS = st.sampled_from(["<|eot_id|>", "<|im_end|>", "<|start_header_id|>", "\n", " ", "a", "é👍", "assistant", "}{"])


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.lists(PARTS, max_size=5).map("".join), min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0)
)
def test_any_answer_is_trained_behind_its_served_prompt(
    llama3: Tokenizer, smollm2: Tokenizer, shared_data: Path, texts: list[str]
) -> None:
    """Llama 3's template trims; SmolLM2's keeps line breaks, which merge with those of the prompt."""
    for name, tokenizer, end in (
        ("llama3.jinja", llama3, "<|eot_id|>"),
        ("SmolLM2-135M-Instruct.jinja", smollm2, "<|im_end|>"),
    ):
        renderer = renderer_of(shared_data, name, tokenizer)
        roles = [("user", "assistant")[i % 2] for i in range(len(texts))]
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        documents = renderer.render(chat(*messages))
        expected = [(text.strip() if end == "<|eot_id|>" else text) + end for text in texts[1::2]]
        assert trained_texts(tokenizer, documents) == expected
        starts = {
            tuple(d.ids[:i]) for d in documents for i in range(1, len(d)) if d.trained[i] and not d.trained[i - 1]
        }
        served = {
            tuple(render_prompt(renderer._chat_template, tokenizer, messages[:i]).ids) for i in range(1, len(texts), 2)
        }
        assert starts == served


def test_llama2_turns(llama2: Tokenizer) -> None:
    renderer = Renderer(llama2, ChatTemplate.for_tokenizer(BUILTIN["llama2"], llama2))
    sample = chat(
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "One two."},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "Three."},
    )
    (document,) = renderer.render(sample)
    assert [text.strip() for text in trained_texts(llama2, [document])] == ["One two. </s>", "Three. </s>"]


def test_a_token_across_the_border_keeps_the_served_prompt(llama3: Tokenizer) -> None:
    """An answer that begins with the line breaks that the prompt ends with would merge with them into one token."""
    source = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n{{ m.content }}<|eot_id|>{% endfor %}"
    )
    source += "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n{% endif %}"
    template = ChatTemplate.for_tokenizer(source, llama3)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\nb"}]
    served = render_prompt(template, llama3, messages[:1]).ids
    written = render_prompt(template, llama3, messages, add_generation_prompt=False).ids
    assert written[: len(served)] != served  # the case is one
    (document,) = Renderer(llama3, template).render(chat(*messages))
    assert document.ids[: len(served)].tolist() == served
    assert trained_texts(llama3, [document]) == ["\nb<|eot_id|>"]


def test_a_template_that_answers_otherwise_is_refused(llama3: Tokenizer) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}bot says ")
    with pytest.raises(DataError, match=r"messages\[1\].*otherwise than its prompts"):
        Renderer(llama3, template).render(chat({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))
    with pytest.raises(DataError, match="begin with the user"):
        Renderer(llama3, template).render(chat({"role": "assistant", "content": "b"}))


def test_raw_text_ends_with_eos_and_prompts_are_not_trained(llama3: Tokenizer, llama2: Tokenizer) -> None:
    for tokenizer in (llama3, llama2):
        renderer = Renderer(tokenizer, None)
        end = tokenizer.token_bytes(tokenizer.eos_id or 0).decode()
        (document,) = renderer.render(Continuation(" Paris.", "The capital of France is"))
        served = tokenizer.encode("The capital of France is", add_bos=True)
        assert document.ids[: len(served)].tolist() == served
        assert trained_texts(tokenizer, [document]) == [f" Paris.{end}"]
        (text,) = renderer.render(Continuation("Hello there"))
        assert text.ids.tolist() == [*tokenizer.encode("Hello there", add_bos=True), tokenizer.eos_id]
        assert text.trained.tolist() == [False] + [True] * (len(text) - 1)
        with pytest.raises(DataError, match="no chat template"):
            renderer.render(chat({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))


def test_what_the_model_brings_along_goes_before(llama3: Tokenizer) -> None:
    template = ChatTemplate.for_tokenizer(BUILTIN["llama3"], llama3)
    history = [Message("user", "1+1?"), Message("assistant", "2.")]
    renderer = Renderer(llama3, template, system="Be kind.", history=history)
    for own in ([], [Message("system", "Be mine.")]):
        question = [*own, Message("user", "a")]
        (document,) = renderer.render(Conversation((*question, Message("assistant", "b")), (len(question),)))
        system = own or [Message("system", "Be kind.")]
        served = render_prompt(template, llama3, [*system, *history, Message("user", "a")]).ids
        assert document.ids[: int(document.trained.argmax())].tolist() == served
        assert trained_texts(llama3, [document]) == ["b<|eot_id|>"]


def test_preferences_and_labels_train_the_answer_alone(llama3: Tokenizer) -> None:
    renderer = Renderer(llama3, ChatTemplate.for_tokenizer(BUILTIN["llama3"], llama3))
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    answers = {side: {"role": "assistant", "content": side} for side in ("chosen", "rejected")}
    row = {"messages": messages, **answers}
    chosen, rejected = renderer.documents(parse_example(detect([row]), row))
    assert trained_texts(llama3, [chosen, rejected]) == ["chosen<|eot_id|>", "rejected<|eot_id|>"]
    row = {"messages": [*messages, answers["chosen"]], "label": False}
    (document,) = renderer.documents(parse_example(detect([row]), row))
    assert trained_texts(llama3, [document]) == ["chosen<|eot_id|>"]
    assert document.ids.tolist() == chosen.ids.tolist()
