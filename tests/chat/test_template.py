"""Templates byte for byte as transformers renders them, and hostile ones stopped."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.chat import sandbox
from puna.chat.builtin import BUILTIN
from puna.chat.template import ChatTemplate
from puna.errors import TemplateError

HELLO = [{"role": "user", "content": "hi"}]


def test_every_vector_renders_as_transformers_does(shared_data) -> None:
    folder = shared_data / "templates"
    cases = json.loads((folder / "vectors-jinja.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) == 144
    for case in cases:
        variables = dict(case["variables"])
        source = (folder / "jinja" / case["template"]).read_text(encoding="utf-8")
        template = ChatTemplate(source, variables.pop("bos_token"), variables.pop("eos_token"))

        def render(template=template, case=case, variables=variables) -> str:
            return template.render(
                case["messages"],
                tools=case["tools"],
                add_generation_prompt=case["add_generation_prompt"],
                **variables,
            )

        if "error" in case:
            with pytest.raises(TemplateError, match="chat template fails on this conversation"):
                render()
        else:
            assert render() == case["expected"], (case["template"], case["conversation"])


def _transformers(source: str, messages, **options) -> str:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = utils.render_jinja_template([messages], chat_template=source, **options)
    return rendered[0]


CONSTRUCTS = {
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ {'b': '<é>', 'a': [1, none]} | tojson }}",
    "loop controls": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% if i > 4 %}{% break %}"
    "{% endif %}{% endfor %}",
    "loop variables": "{% for m in messages %}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}"
    "{{ loop.previtem }}{{ loop.nextitem is defined }}{{ loop.revindex }}{% else %}none{% endfor %}",
    "filtered loop": "{% for m in messages if m.role == 'user' %}{{ loop.length }}{{ m.content }}{% endfor %}",
    "reversed": "{% for m in messages | reverse %}{{ m.content }}{% endfor %}{% for m in messages[::-1] %}{{ m.role }}"
    "{% endfor %}",
    "unpacking": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{% for k, v in {'a': 1} | items %}"
    "{{ k ~ v }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, l=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.l = ns.l + [m.content] %}{% endfor %}{{ ns.n }}{{ ns.l }}",
    "macro": "{% macro f(x, y='d') %}<{{ x }}{{ y }}{{ caller() if caller }}>{% endmacro %}{{ f(1) }}{{ f('a', y=2) }}"
    "{% call f(3) %}body{% endcall %}",
    "text": "{{ ' Ab ' | trim | upper }}{{ 'a,b'.split(',')[-1] }}{{ 'x' ~ 1 ~ none ~ [1, 'a'] }}{{ 'ab' * 2 }}"
    "{{ 'aXbX' | replace('X', '') }}{{ 'aXbX'.replace('X', '-', 1) }}{{ ', '.join(['a', 'b']) }}{{ 'é' | title }}",
    "lists": "{{ messages | map(attribute='role') | join(', ') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ [1, 2] + [3] }}{{ (1, 2) }}{{ dict(a=1) }}{{ [3, 1] | sort | first }}",
    "numbers": "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ 1 / 4 }}{{ -3 | abs }}{{ '5' | int + 1 }}{{ true }}{{ none }}",
    "undefined": "{{ nothing }}{{ nothing is defined }}{% if messages[0].nothing %}x{% endif %}"
    "{{ nothing | default('d') }}{% for x in nothing %}y{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{% set inner = 1 %}{{ m.content }}{% endgeneration %}"
    "{{ inner is defined }}{% endfor %}",
    "blocks": "  {% if true %}\n    kept  \n  {% endif %}\n\ttail\n{#- note -#}\n\n",
    "set block": "{% set x %}a{{ messages[0].content }}{% endset %}{{ x | length }}{{ x }}",
    "tests": "{{ messages is iterable }}{{ messages[0] is mapping }}{{ 'a' is string }}"
    "{{ 'hi' in messages[0].content }}",
    "indent": "{{ 'a\\n\\nb' | indent(2) }}|{{ 'a\\nb\\n' | indent(2, first=true) }}|"
    "{{ 'a\\n\\nb' | indent('> ', blank=true) }}",
}


@pytest.mark.parametrize("construct", CONSTRUCTS)
def test_constructs_mean_what_they_mean_in_transformers(construct: str) -> None:
    source = CONSTRUCTS[construct]
    messages = [{"role": "user", "content": "<hi> ünï 👍"}, {"role": "assistant", "content": "x\ny"}]
    assert ChatTemplate(source).render(messages) == _transformers(source, messages, bos_token="", eos_token="")


def test_a_known_date() -> None:
    year = ChatTemplate("{{ strftime_now('%Y') }}").render(HELLO)
    assert year.isdigit()
    assert len(year) == 4


def test_continuing_the_last_message() -> None:
    template = ChatTemplate(BUILTIN["llama3"], "<|begin_of_text|>", "<|eot_id|>")
    conversation = [*HELLO, {"role": "assistant", "content": "The answer is "}]
    text = template.render(conversation, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\nThe answer is ")
    with pytest.raises(TemplateError, match="exclude each other"):
        template.render(conversation, continue_final_message=True)
    with pytest.raises(TemplateError, match="does not show the last message"):
        ChatTemplate("x").render(HELLO, add_generation_prompt=False, continue_final_message=True)


def test_the_template_says_why_it_rejects() -> None:
    with pytest.raises(TemplateError, match=r"rejects the conversation: roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(HELLO)


@pytest.mark.parametrize(
    "source", ["{% if", "{{ x", "{% while true %}", "{{ 'a' | no_such_filter }}", "{{ " + "(" * 9999]
)
def test_a_broken_template_does_not_compile(source: str) -> None:
    with pytest.raises(TemplateError, match="does not compile"):
        ChatTemplate(source)
    with pytest.raises(TemplateError, match="1048577 characters"):
        ChatTemplate("x" * 1048577)


def _hundred_times(statement: str, start: str = "'aaaa'") -> str:
    return (
        f"{{% set ns = namespace(s={start}) %}}{{% for i in range(100) %}}{{% set ns.s = {statement} %}}{{% endfor %}}"
    )


BIG = "'a' * 1000000"
HOSTILE = {
    "dunder": "{{ messages.__class__.__mro__ }}{{ ''.__class__.__mro__ }}",
    "globals": "{{ messages[0].content.__init__.__globals__ }}",
    "global function": "{{ raise_exception.__globals__.sys }}",
    "filter to attribute": "{{ ('' | attr('__class__')).x }}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "extends": "{% extends 'x' %}",
    "namespace dunder": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "namespace keyword": "{{ namespace(**{'__html__': 1}) }}",
    "huge range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "doubling macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless block": "{% block a %}{{ self.a() }}{% endblock %}",
    "repeat": "{{ 'a' * 10**10 }}",
    "repeat list": "{{ ([[1] * 100000] * 100000) | length }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "squaring": _hundred_times("ns.s * ns.s", "9") + "{{ ns.s }}",
    "doubling ~": _hundred_times("ns.s ~ ns.s"),
    "doubling +": _hundred_times("ns.s + ns.s"),
    "doubling set": "{% set x = 'aaaa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "doubling list": _hundred_times("ns.s + ns.s", "[1]"),
    "nesting list": _hundred_times("[ns.s, ns.s]", "[1]") + "{{ ns.s }}",
    "nesting tuple": _hundred_times("(ns.s, ns.s)", "[1]") + "{{ ns.s ~ '' }}",
    "nesting dict": _hundred_times("{'a': ns.s, 'b': ns.s}", "[1]") + "{{ ns.s | tojson }}",
    "nesting dict()": _hundred_times("dict(a=ns.s, b=ns.s)", "[1]") + "{{ ns.s | tojson }}",
    "nesting namespace": _hundred_times("namespace(a=ns.s, b=ns.s)", "1") + "{{ ns.s }}",
    "trim a namespace": _hundred_times("namespace(a=ns.s, b=ns.s)", "1") + "{{ ns.s | trim }}",
    "nested comparison": _hundred_times("[ns.s, ns.s]", "[1]") + "{{ ns.s == ns.s }}",
    "replace": f"{{{{ ({BIG}) | replace('a', {BIG}) }}}}",
    "str.replace": f"{{{{ ({BIG}).replace('a', {BIG}) }}}}",
    "join": f"{{{{ ({BIG}) | join({BIG}) }}}}",
    "str.join": f"{{{{ ({BIG}).join({BIG}) }}}}",
    "indent": "{{ ('a\\n' * 1000000) | indent(100000) }}",
    "tojson indent": "{{ range(100000) | list | tojson(indent=1000000) }}",
    "map replace": f"{{{{ range(100000) | map('string') | map('replace', '', {BIG}) | list }}}}",
    "center": "{{ 'a' | center(10**10) }}",
    "str.center": "{{ 'a'.center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "zfill": "{{ 'a'.zfill(10000000000) }}",
    "str.format": "{{ '{:>10000000000}'.format(1) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "to_bytes": "{{ (1).to_bytes(10000000000) }}",
    "fromkeys": "{{ {}.fromkeys(range(100000), 'a' * 100000) }}",
    "print a function": "{{ raise_exception }}",
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_templates_are_stopped(attack: str, monkeypatch) -> None:
    """Bounded by counting: the deadline is far away here, so that nothing depends on this machine's speed."""
    monkeypatch.setattr(sandbox, "BASE_BUDGET", 1_000_000)
    monkeypatch.setattr(sandbox, "SECONDS", 3600.0)
    with pytest.raises(TemplateError):
        ChatTemplate(HOSTILE[attack]).render(HELLO)


def test_the_deadline_ends_what_counting_would_allow(monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", -1.0)
    with pytest.raises(TemplateError, match="seconds"):
        ChatTemplate("{% for m in messages %}{{ m }}{% endfor %}").render(HELLO)


def test_a_long_conversation_is_no_attack() -> None:
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * 200} for i in range(2000)]
    text = ChatTemplate(BUILTIN["llama2"], "<s>", "</s>").render(messages[:-1])
    assert text.count("[/INST]") == 1000


def test_only_plain_values_reach_a_template() -> None:
    with pytest.raises(TemplateError, match="takes text, numbers, lists and dictionaries, found object"):
        ChatTemplate("{{ x }}").render(HELLO, x=object())


@given(st.text(alphabet="{}%#'\"[]()|~.aé \n-+*", max_size=60))
def test_any_source_gives_text_or_a_template_error(source: str) -> None:
    with suppress(TemplateError):
        assert isinstance(ChatTemplate(source).render(HELLO), str)
