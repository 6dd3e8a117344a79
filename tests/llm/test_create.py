"""Models made from Modelfiles: what is inherited, what is stored, what a chat then sees, and all-or-nothing errors."""

import json
from pathlib import Path

import numpy as np
import pytest
from lora_files import write_peft
from tiny_models import random_adapter

from puna import LLM
from puna.chat.go_template import GoTemplate
from puna.checkpoint import open_checkpoint, save_checkpoint
from puna.checkpoint.lora_writer import merge
from puna.errors import CheckpointError, PunaError, RequestError, StoreError, TemplateError
from puna.gguf_file import read_gguf
from puna.llm.create import create, create_from_modelfile, modelfile_of, read_modelfile
from puna.quantize import QuantizeSettings, quantize, quantizer
from puna.store import Lineage, Manifest, Store, import_file, resolve_stored
from puna.store.modelfile import parse_modelfile

TEMPLATE = "{{ range .Messages }}[{{ .Role }}] {{ .Content }}\n{{ end }}[assistant]"

IDS = [1, 403, 407, 261, 378]


class Told:
    """Progress that remembers its sentences."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def status(self, text: str) -> None:
        self.said.append(text)

    def transfer(self, label: str, done: int, total: int, speed: float) -> None:
        pass


@pytest.fixture
def weights(shared_data: Path) -> Path:
    return shared_data / "weights" / "stories260K"


@pytest.fixture
def store(tmp_path: Path, weights: Path) -> Store:
    store = Store(tmp_path / "home", notify=lambda message: None)
    import_file(weights / "stories260K.gguf", "stories", store=store)
    return store


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    folder = tmp_path / "my-adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights of an adapter")
    (folder / "optimizer.pt").write_bytes(b"not wanted")
    return folder


def test_a_model_from_a_stored_one(store: Store, peft: Path, tmp_path: Path) -> None:
    text = f'''FROM stories
TEMPLATE """{TEMPLATE}"""
SYSTEM Tell stories.
PARAMETER temperature 0
PARAMETER num_ctx 64
PARAMETER num_predict 3
PARAMETER stop "Lily"
MESSAGE user Who?
MESSAGE assistant Tim.
LICENSE be kind
ADAPTER ./{peft.name}
'''
    (tmp_path / "Modelfile").write_text(text, encoding="utf-8")
    told = Told()
    made = create_from_modelfile(store, "teller", read_modelfile(tmp_path / "Modelfile"), tmp_path, told)
    parent = store.find("stories")
    assert store.find("teller") == made
    assert made.files == parent.files
    assert made.parameters == {"temperature": 0.0, "num_ctx": 64, "num_predict": 3, "stop": ["Lily"]}
    assert made.lineage is not None
    assert (made.lineage.parent, made.lineage.method) == ("stories:latest", "create")
    assert told.said[0] == f"using existing layer sha256:{parent.files[0].sha256}"
    assert [line.split(" sha256")[0] for line in told.said[1:]] == [*["creating new layer"] * 2, "writing manifest"]
    adapters = store.adapter_paths(made)
    assert list(adapters) == ["my-adapter"]
    assert sorted(path.name for path in adapters["my-adapter"].iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]

    with LLM.load(resolve_stored(made, store), adapters=False) as llm:
        assert isinstance(llm.template, GoTemplate)
        assert llm.context_length == 64
        assert (llm.sampling().temperature, llm.sampling().max_tokens, llm.sampling().stop) == (0, 3, ("Lily",))
        begin = "[system] Tell stories.\n[user] Who?\n[assistant] Tim.\n"
        assert llm.prompt([{"role": "user", "content": "Go"}]).text == begin + "[user] Go\n[assistant]"
        own = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Go"}]
        assert llm.prompt(own).text.startswith("[system] Be short.\n[user] Who?\n")
        assert len(llm.chat([{"role": "user", "content": "Go"}]).token_ids) <= 3


def test_a_single_adapter_is_part_of_the_model(store: Store, tmp_path: Path) -> None:
    """All that the model says and scores is the adapter's, as if one had named it."""
    bare = resolve_stored(store.find("stories"), store)
    with LLM.load(bare) as llm:
        adapter = random_adapter(llm.config, 4, seed=1, size=0.02)
        llm.load_adapter("named", write_peft(tmp_path / "tuned", adapter))
        expected = llm.generate("Once", temperature=0, max_tokens=20, adapter="named").text
        plain = llm.logits(IDS)
        merged_model = merge(open_checkpoint(bare.path), adapter)
    save_checkpoint(merged_model, tmp_path / "merged", "safetensors", "F32")
    with LLM.load(tmp_path / "merged") as merged:
        logits, score, embedding = merged.logits(IDS), merged.score("Once", " upon"), merged.embed("Once upon a time")
    create(store, "one", from_="stories", adapters=[tmp_path / "tuned"])
    with LLM.load(resolve_stored(store.find("one"), store)) as llm:
        assert llm.generate("Once", temperature=0, max_tokens=20).text == expected
        assert np.abs(llm.logits(IDS) - plain).max() > 0.5
        np.testing.assert_allclose(llm.logits(IDS), logits, atol=0.05)
        assert llm.score("Once", " upon").logprob == pytest.approx(score.logprob, abs=0.02)
        np.testing.assert_allclose(llm.embed("Once upon a time"), embedding, atol=0.01)
    create(store, "two", from_="stories", adapters=[tmp_path / "tuned", tmp_path / "tuned"])
    with LLM.load(resolve_stored(store.find("two"), store)) as llm:
        assert list(llm.adapters) == ["tuned", "tuned-2"]
        np.testing.assert_array_equal(llm.logits(IDS), plain)
    with LLM.load(resolve_stored(store.find("one"), store), adapters=False) as llm:
        np.testing.assert_array_equal(llm.logits(IDS), plain)


def test_children_inherit_and_override(store: Store) -> None:
    create(
        store, "a", from_="stories", system="A", parameters={"top_k": 1, "seed": 1}, license="one", template=TEMPLATE
    )
    made = create(store, "b", from_="a", system="B", parameters={"seed": 2}, license=["two", "one"])
    assert (made.template, made.system, made.licence_texts) == (TEMPLATE, "B", ("one", "two"))
    assert made.parameters == {"top_k": 1, "seed": 2}
    again = create(store, "a", from_="a", messages=[{"role": "user", "content": "x"}])
    assert (again.system, again.messages) == ("A", (("user", "x"),))


def test_adapters_stay_with_their_model(store: Store, peft: Path) -> None:
    create(store, "tuned", from_="stories", adapters=[peft, peft])
    made = create(store, "child", from_="tuned")
    assert list(store.adapter_paths(made)) == ["my-adapter", "my-adapter-2"]
    store.remove("tuned")
    store.collect_garbage()
    path = store.adapter_paths(made)["my-adapter"] / "adapter_model.safetensors"
    assert path.read_bytes() == b"weights of an adapter"
    assert store.verify("child") == []
    store.blobs.path(made.adapters[0].files[1].sha256).write_bytes(b"weights of another.!!")
    assert [damage.file for damage in store.verify("child")] == ["adapter_model.safetensors"] * 2
    store.remove("child")
    assert store.blobs.path(made.files[0].sha256).exists()
    assert not path.exists()


def test_a_model_from_files(store: Store, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.gguf").write_bytes((weights / "stories260K.gguf").read_bytes())
    made = create_from_modelfile(store, "x", parse_modelfile("FROM ./copy.gguf"), tmp_path)
    assert [file.file for file in made.files] == ["copy.gguf"]
    folder = create(store, "y", from_=weights / "hf")
    assert "config.json" in {file.file for file in folder.files}
    digest = store.find("stories").files[0].sha256
    sent = create(store, "z", files={"model.gguf": f"sha256:{digest}"})
    assert (sent.files[0].file, sent.files[0].sha256) == ("model.gguf", digest)


@pytest.mark.parametrize(
    ("options", "kind", "problem"),
    [
        ({"from_": "nowhere"}, StoreError, "no model nowhere"),
        ({"from_": "stories", "template": "{{ .X"}, TemplateError, "line 1"),
        ({"from_": "stories", "template": "{% if %}"}, TemplateError, "line 1"),
        ({"from_": "stories", "parameters": {"temprature": 1}}, RequestError, "did you mean temperature"),
        ({"from_": "stories", "parameters": {"top_p": 3}}, RequestError, "top_p"),
        ({"from_": "stories", "messages": [{"role": "tool", "content": "x"}]}, StoreError, "role must be one of"),
        ({"from_": "stories", "adapters": ["/nowhere.gguf"]}, StoreError, "adapter /nowhere.gguf is neither"),
        ({"from_": "/etc/passwd"}, StoreError, "neither a .gguf"),
        ({"from_": "/etc/passwd", "paths": False}, StoreError, "not a model name"),
        ({"from_": "stories", "adapters": ["/x"], "paths": False}, StoreError, "must be blobs"),
        ({"files": {"../x": "sha256:" + "0" * 64}}, StoreError, "unusual characters"),
        ({"files": {"x.gguf": "sha256:../.."}}, StoreError, "64 hexadecimal digits"),
        ({"files": {"x.gguf": "sha256:" + "0" * 64}}, StoreError, "send it first"),
        ({}, StoreError, "give one of"),
    ],
)
def test_nothing_is_stored_when_something_is_wrong(
    options: dict[str, object], kind: type[PunaError], problem: str, store: Store
) -> None:
    before = store.models()
    with pytest.raises(kind, match=problem):
        create(store, "made", **options)  # type: ignore[arg-type]
    assert store.models() == before


def test_a_file_that_is_no_model_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    with pytest.raises(CheckpointError):
        create(store, "made", from_=tmp_path / "bad.gguf")
    assert [manifest.name for manifest in store.models()] == ["stories"]


def test_what_show_prints_makes_the_model_again(store: Store, peft: Path) -> None:
    settings = {"temperature": 0.5, "stop": ["a b", "c"], "numa": True, "num_ctx": 32}
    messages = [{"role": "user", "content": "Hi\nthere"}]
    made = create(
        store, "a", from_="stories", template=TEMPLATE, parameters=settings, messages=messages, adapters=[peft]
    )
    again = create_from_modelfile(store, "b", modelfile_of(made, store), Path("/"))

    def facts(manifest: Manifest) -> list[object]:
        adapters = [adapter.files for adapter in manifest.adapters]
        return [manifest.files, manifest.template, manifest.parameters, manifest.messages, adapters]

    assert facts(again) == facts(made)


def test_quantized_weights_are_those_of_quantize(store: Store, weights: Path, tmp_path: Path) -> None:
    """From a stored model, a folder and blobs alike; what goes with the weights is kept."""
    quantize(weights / "stories260K.gguf", tmp_path / "expected.gguf", QuantizeSettings(mix="Q4_K_M"))
    expected = read_gguf(tmp_path / "expected.gguf").tensors
    create(store, "mine", from_="stories", system="Short.", license="Free.")
    sent = store.find("stories").files[0]
    for number, base in enumerate(
        ({"from_": "mine"}, {"from_": weights / "hf"}, {"files": {"a.gguf": f"sha256:{sent.sha256}"}})
    ):
        made = create(store, f"small{number}", **base, quantize=quantizer("q4_K_M"))
        tensors = read_gguf(store.path_of(made)).tensors
        assert {name: weight.type for name, weight in tensors.items()} == {n: w.type for n, w in expected.items()}
        assert all(np.array_equal(tensors[name].data, weight.data) for name, weight in expected.items())
    small = store.find("small0")
    assert (small.system, small.licence_texts) == ("Short.", ("Free.",))
    assert (small.lineage, small.report) == (Lineage("mine:latest", "quantize"), None)
    assert not list(store.blobs.partial.iterdir())
    assert store.verify() == []


def test_quantizing_that_was_cut_off_is_continued(store: Store) -> None:
    class Interrupted(Told):
        def transfer(self, label: str, done: int, total: int, speed: float) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create(store, "small", from_="stories", quantize=quantizer("Q8_0"), progress=Interrupted())
    assert {manifest.name for manifest in store.models()} == {"stories"}
    assert any(path.name.endswith(".gguf.part") for path in store.blobs.partial.iterdir())
    create(store, "small", from_="stories", quantize=quantizer("Q8_0"))
    assert not list(store.blobs.partial.iterdir())


def test_what_is_quantized_already_is_refused(store: Store) -> None:
    create(store, "small", from_="stories", quantize=quantizer("Q8_0"))
    with pytest.raises(RequestError, match="quantization is only supported for F16 and F32 models"):
        create(store, "smaller", from_="small", quantize=quantizer("Q4_0"))
    with pytest.raises(RequestError, match="unknown quantization type 'Q9_0'"):
        quantizer("Q9_0")
    assert {manifest.name for manifest in store.models()} == {"small", "stories"}
    assert not list(store.blobs.partial.iterdir())
