"""Names: what is one, and that none leads out of the store's folder."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.errors import StoreError
from puna.store.names import ModelName, catalog_entry, name_part_from


@pytest.mark.parametrize(
    ("text", "name", "tag"),
    [
        ("smollm2", "smollm2", "latest"),
        ("Llama-3.2-1B:Q4_K_M", "llama-3.2-1b", "q4_k_m"),
        ("owner/Name_x:v1.0", "owner/name_x", "v1.0"),
        ("hf.co/Owner/Repo-GGUF:Q8_0", "owner/repo-gguf", "q8_0"),
        ("hf.co/owner/repo:model.Q8_0.gguf", "owner/repo", "model.q8_0"),
        (" smollm2 ", "smollm2", "latest"),
    ],
)
def test_names(text: str, name: str, tag: str) -> None:
    assert ModelName.parse(text) == ModelName(name, tag)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "a:",
        "a:b:c",
        "../a",
        "a/../b",
        "a/..",
        "/a",
        "a//b",
        "a/",
        ".hidden",
        "a:.b",
        "a b",
        "a\\b",
        "a\x00b",
        "é",
        "a:x/y",
        "a.json/b",
        "a:b.json",
        "a" * 200,
        "a/b/c/d/e",
        "C:\\x",
        "-rf",
        "a\n"[:1] + "\nb",
    ],
)
def test_not_names(text: str) -> None:
    with pytest.raises(StoreError, match="is not a model name"):
        ModelName.parse(text)


@given(st.one_of(st.text(max_size=30), st.text("aB1._-/:~\\", max_size=30)))
def test_a_name_stays_in_its_folder_and_reads_back(text: str) -> None:
    try:
        name = ModelName.parse(text)
    except StoreError:
        return
    root = Path("/root/manifests")
    path = (root / name.manifest).resolve()
    assert path.is_relative_to(root)
    assert path.suffix == ".json"
    assert ModelName.parse(str(name)) == name


@given(st.text(max_size=40))
def test_a_name_made_from_any_text_is_a_name(text: str) -> None:
    try:
        part = name_part_from(text)
    except StoreError:
        return
    assert ModelName.parse(part) == ModelName(part)


def test_the_catalog_is_asked_for_plain_names_and_its_own_repositories_only() -> None:
    entry = catalog_entry("smollm2")
    assert entry is not None
    assert catalog_entry("HuggingFaceTB/SmolLM2-135M-Instruct") is entry
    assert catalog_entry("somebody/SmolLM2-135M-Instruct") is None
    assert catalog_entry("no-such-model-anywhere") is None
