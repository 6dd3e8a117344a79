"""Modelfiles: ollama's format as its documentation tells it, errors that name the line, and a lossless round trip."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.errors import StoreError
from puna.store.modelfile import Modelfile, parse_modelfile, write_modelfile

DOCUMENTED = '''
# a comment
FROM llama3.2
# sets the temperature to 1
PARAMETER temperature 1
  parameter stop "AI assistant:"
PARAMETER stop # not a comment
TEMPLATE """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}"""
SYSTEM You are Mario from "Super Mario Bros".
Adapter ./lora.gguf
ADAPTER ./second
LICENSE """
<license text>
"""
MESSAGE user Is Toronto in Canada?
MESSAGE assistant yes
MESSAGE user """two
lines"""
'''


def test_the_documented_instructions() -> None:
    assert parse_modelfile(DOCUMENTED) == Modelfile(
        from_="llama3.2",
        parameters=(("temperature", "1"), ("stop", "AI assistant:"), ("stop", "# not a comment")),
        template="{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}",
        system='You are Mario from "Super Mario Bros".',
        adapters=("./lora.gguf", "./second"),
        licences=("\n<license text>\n",),
        messages=(("user", "Is Toronto in Canada?"), ("assistant", "yes"), ("user", "two\nlines")),
    )


def test_windows_line_ends_and_a_byte_order_mark() -> None:
    assert parse_modelfile('\ufeffFROM a\r\nSYSTEM """x\r\ny"""\r\n').system == "x\ny"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no FROM; begin it"),
        ("FROM a\nFROM b", "line 2: a second FROM"),
        ("# x\nFORM a", "line 2: unknown instruction 'FORM'; did you mean FROM"),
        ("FROM a\n\nPARAMETER temperature", "line 3: PARAMETER needs a value; as in `PARAMETER temperature"),
        ("FROM a\nMESSAGE robot hi", "line 2: the role 'robot' is not one of system, user, assistant"),
        ('FROM a\nSYSTEM """x\ny', "line 2: the quotes that open here are never closed"),
        ('FROM a\nSYSTEM "x', "line 2: the quotes"),
        ("FROM", "line 1: FROM needs a value"),
    ],
)
def test_errors_name_the_line_and_the_remedy(text: str, problem: str) -> None:
    with pytest.raises(StoreError, match=problem):
        parse_modelfile(text)


TEXTS = st.text(st.characters(exclude_characters="\r", exclude_categories=["Cs"])) | st.text('" \n\t#a')
WORDS = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
MODELFILES = st.builds(
    Modelfile,
    from_=st.from_regex(r"[a-z./ -]{0,20}[a-z]", fullmatch=True).map(str.strip),
    parameters=st.lists(st.tuples(WORDS, TEXTS), max_size=3).map(tuple),
    template=st.none() | TEXTS,
    system=st.none() | TEXTS,
    adapters=st.lists(TEXTS, max_size=2).map(tuple),
    licences=st.lists(TEXTS, max_size=2).map(tuple),
    messages=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXTS), max_size=3).map(tuple),
)


@given(MODELFILES)
def test_what_is_written_is_read_or_refused(modelfile: Modelfile) -> None:
    try:
        text = write_modelfile(modelfile)
    except StoreError:
        values = [modelfile.template, modelfile.system, *modelfile.adapters, *modelfile.licences]
        values += [text for _, text in (*modelfile.parameters, *modelfile.messages)]
        assert any('"' in value for value in values if value)
        return
    assert parse_modelfile(text) == modelfile


def test_only_lines_that_end_in_three_quotes_have_no_spelling() -> None:
    assert parse_modelfile(write_modelfile(Modelfile("a", system='"one" "two"\n'))).system == '"one" "two"\n'
    with pytest.raises(StoreError, match="cannot hold"):
        write_modelfile(Modelfile("a", system='x"""\ny'))


@given(st.text('FROM"\n #SYTEMPA:.x') | st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        modelfile = parse_modelfile(text)
    except StoreError:
        return
    assert modelfile.from_
