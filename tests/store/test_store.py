"""Names, files and bytes of the store, in one process."""

import hashlib
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from puna.errors import StoreError
from puna.store import Damage, Lineage, Manifest, ModelName, Store, StoredFile, import_file, pull, resolve
from puna.store.blobs import PARTIAL_LIFETIME
from puna.store.store import MissingBlobs, default_home


def gguf(folder: Path, name: str = "tiny.gguf", content: bytes = b"weights") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(b"GGUF" + content)
    return path


def checkpoint_folder(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "README.md", ".hidden", "optimizer.pt"):
        (folder / name).write_text(name)
    return folder


def blobs(store: Store) -> set[str]:
    return {path.name for path in store.blobs.folder.glob("*")}


def test_import_links_instead_of_copying(store: Store, tmp_path: Path) -> None:
    path = gguf(tmp_path)
    manifest = import_file(path, store=store, licence="mit", lineage=Lineage("parent:latest", "import"))
    opened = resolve("tiny", store)
    assert opened.manifest == manifest == store.find("tiny:latest")
    assert opened.path.name == "tiny.gguf"
    assert opened.path.samefile(path)
    assert not opened.path.is_symlink()
    assert (manifest.size, manifest.source, manifest.licence) == (11, str(path), "mit")
    assert manifest.files[0].sha256 == hashlib.sha256(b"GGUFweights").hexdigest()


def test_import_copies_when_asked_or_when_it_must(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gguf(tmp_path)
    import_file(path, "one", store=store, copy=True)
    assert not resolve("one", store).path.samefile(path)
    other = gguf(tmp_path, "other.gguf", b"other")

    def no_links(*args: object) -> None:
        raise OSError("this disk has no links")

    monkeypatch.setattr(os, "link", no_links)
    import_file(other, "two", store=store)
    assert not resolve("two", store).path.samefile(other)
    assert resolve("two", store).path.is_symlink()
    monkeypatch.setattr(os, "symlink", no_links)
    third = gguf(tmp_path, "third.gguf", b"third")
    import_file(third, "three", store=store)
    path.write_bytes(b"changed")
    other.write_bytes(b"changed")
    third.write_bytes(b"changed")
    assert store.verify() == []
    assert resolve("three", store).path.read_bytes() == b"GGUFthird"


def test_a_folder_opens_as_a_folder_with_the_model_s_files_only(store: Store, tmp_path: Path) -> None:
    import_file(checkpoint_folder(tmp_path / "My Model"), store=store)
    path = resolve("my-model", store).path
    assert {file.name for file in path.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (path / "config.json").read_text() == "config.json"


def test_a_folder_of_links_is_followed(store: Store, tmp_path: Path) -> None:
    """Hugging Face's cache is one: linking the links themselves would break when it moves."""
    real = checkpoint_folder(tmp_path / "real")
    cache = tmp_path / "cache"
    cache.mkdir()
    for file in real.iterdir():
        (cache / file.name).symlink_to(file)
    import_file(cache, store=store)
    stored = resolve("cache", store).path / "model.safetensors"
    assert not stored.is_symlink()
    assert stored.samefile(real / "model.safetensors")


def test_what_is_stored_opens(store: Store, shared_data: Path) -> None:
    """A real model as a folder and as GGUF: what the store gives is what the checkpoint readers take."""
    from puna.checkpoint import open_checkpoint

    weights = shared_data / "weights" / "stories260K"
    import_file(weights / "hf", "folder", store=store)
    import_file(next(weights.glob("*.gguf")), "file", store=store)
    for name in ("folder", "file"):
        checkpoint = open_checkpoint(resolve(name, store).path)
        assert checkpoint.config.hidden_size == 64
        assert checkpoint.tokenizer is not None


def test_a_safetensors_file_brings_its_configuration(store: Store, tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path / "m")
    import_file(folder / "model.safetensors", "m", store=store)
    assert {f.file for f in store.find("m").files} == {"config.json", "tokenizer.json", "model.safetensors"}


def test_a_split_gguf_comes_whole_and_opens_at_its_first_part(store: Store, tmp_path: Path) -> None:
    for part in (1, 2):
        gguf(tmp_path, f"m-0000{part}-of-00002.gguf", bytes([part]))
    import_file(tmp_path / "m-00002-of-00002.gguf", store=store)
    path = resolve("m", store).path
    assert path.name == "m-00001-of-00002.gguf"
    assert (path.parent / "m-00002-of-00002.gguf").exists()
    (tmp_path / "m-00001-of-00002.gguf").unlink()
    with pytest.raises(StoreError, match=r"lacks m-00001-of-00002\.gguf"):
        import_file(tmp_path / "m-00002-of-00002.gguf", "n", store=store)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.gguf", b"<html>", "not a GGUF file: it begins with b'<htm'"),
        ("x.gguf", b"", "not a GGUF file"),
        ("x.bin", b"GGUF", "neither a .gguf nor a .safetensors"),
        ("x y?.gguf", b"GGUF", "unusual characters"),
        ("...gguf", b"GGUF", "unusual characters|cannot make a model name"),
    ],
)
def test_what_cannot_be_imported(store: Store, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StoreError, match=message):
        import_file(tmp_path / name, store=store)
    with pytest.raises(StoreError, match="does not exist"):
        import_file(tmp_path / "missing.gguf", store=store)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="holds no model"):
        import_file(tmp_path / "empty", store=store)


def test_a_taken_name_needs_replace(store: Store, tmp_path: Path) -> None:
    one, two = gguf(tmp_path, "one.gguf", b"1"), gguf(tmp_path, "two.gguf", b"2")
    import_file(one, "m", store=store)
    before = blobs(store)
    with pytest.raises(StoreError, match=r"m:latest exists already.*puna rm m:latest"):
        import_file(two, "m", store=store)
    same_file_name = gguf(tmp_path / "elsewhere", "one.gguf", b"3")
    with pytest.raises(StoreError, match="m:latest exists already"):
        import_file(same_file_name, "m", store=store)
    import_file(two, "m", store=store, replace=True)
    assert resolve("m", store).path.read_bytes() == b"GGUF2"
    assert not blobs(store) & before  # what it replaced is collected


def test_importing_again_keeps_settings(store: Store, tmp_path: Path) -> None:
    path = gguf(tmp_path)
    manifest = replace(import_file(path, store=store), system="Be brief.", parameters={"temperature": 0.1})
    store.commit(manifest)
    assert import_file(path, store=store) == manifest
    assert store.find("tiny").system == "Be brief."


def test_a_file_that_changes_while_it_is_read(store: Store, tmp_path: Path) -> None:
    path = gguf(tmp_path)

    class Progress:
        def status(self, text: str) -> None:
            pass

        def transfer(self, label: str, done: int, total: int, speed: float) -> None:
            path.write_bytes(b"GGUF and more")

    with pytest.raises(StoreError, match="changed while it was read"):
        import_file(path, store=store, progress=Progress())
    assert store.models() == []
    assert list(store.blobs.partial.glob("sha256-*")) == []


def test_copies_share_bytes_until_the_last_is_removed(store: Store, tmp_path: Path) -> None:
    path = gguf(tmp_path)
    import_file(path, "a", store=store, copy=True)
    store.copy("a", "owner/b:v1")
    assert [str(m.model_name) for m in store.models()] == ["a:latest", "owner/b:v1"]
    assert len(blobs(store)) == 1
    assert store.remove("a") == 0
    assert resolve("owner/b:v1", store).path.read_bytes() == path.read_bytes()
    assert store.remove("owner/b:v1") == 11
    assert store.models() == []
    assert [p for p in store.home.rglob("*") if p.is_file()] == [store.home / "lock"]
    assert list((store.home / "manifests").iterdir()) == []


def test_copy_does_not_overwrite_by_accident(store: Store, tmp_path: Path) -> None:
    import_file(gguf(tmp_path, "a.gguf", b"a"), store=store)
    import_file(gguf(tmp_path, "b.gguf", b"b"), store=store)
    with pytest.raises(StoreError, match="b:latest exists already"):
        store.copy("a", "b")
    store.copy("a", "b", replace=True)
    assert resolve("b", store).path.read_bytes() == b"GGUFa"


def test_removing_a_linked_import_frees_nothing_and_leaves_the_original(store: Store, tmp_path: Path) -> None:
    path = gguf(tmp_path)
    import_file(path, store=store)
    assert store.remove("tiny") == 0
    assert path.read_bytes() == b"GGUFweights"


def test_verify_finds_a_modified_original(store: Store, tmp_path: Path) -> None:
    path = gguf(tmp_path)
    import_file(path, store=store)
    assert store.verify() == []
    with path.open("r+b") as file:
        file.write(b"XXXX")
    (damage,) = store.verify("tiny")
    assert (damage.model, damage.file) == (ModelName("tiny"), "tiny.gguf")
    assert "sha256 is" in damage.problem
    path.write_bytes(b"GGUF longer than before")
    with pytest.raises(
        StoreError, match=r"tiny\.gguf of tiny:latest has 23 bytes instead of 11; .*puna rm tiny:latest"
    ):
        resolve("tiny", store)
    store.blobs.path(store.find("tiny").files[0].sha256).unlink()
    assert store.verify() == [Damage(ModelName("tiny"), "tiny.gguf", "lost")]
    with pytest.raises(StoreError, match=r"tiny\.gguf of tiny:latest is lost"):
        resolve("tiny", store)


def test_importing_again_repairs(store: Store, tmp_path: Path) -> None:
    path = gguf(tmp_path)
    import_file(path, store=store)
    path.write_bytes(b"GGUF longer than before")
    path.unlink()
    gguf(tmp_path)
    import_file(path, store=store)
    assert store.verify() == []
    assert resolve("tiny", store).path.read_bytes() == b"GGUFweights"


def test_a_lost_view_is_made_anew(store: Store, tmp_path: Path) -> None:
    import_file(gguf(tmp_path), store=store)
    shutil.rmtree(store.home / "views")
    assert resolve("tiny", store).path.read_bytes() == b"GGUFweights"


def test_the_store_may_be_moved(store: Store, tmp_path: Path) -> None:
    import_file(gguf(tmp_path), store=store)
    moved = Store(store.home.rename(tmp_path / "moved"))
    assert resolve("tiny", moved).path.read_bytes() == b"GGUFweights"


def test_a_manifest_without_its_bytes_is_not_stored(store: Store) -> None:
    with pytest.raises(MissingBlobs, match=r"x\.gguf of a:latest must be fetched again"):
        store.commit(Manifest("a", "latest", (StoredFile("x.gguf", "0" * 64, 1),)))
    assert store.models() == []


def test_a_damaged_manifest_is_told_and_keeps_its_blobs(tmp_path: Path) -> None:
    told: list[str] = []
    store = Store(tmp_path / "home", notify=told.append)
    import_file(gguf(tmp_path), "good", store=store)
    import_file(gguf(tmp_path, "other.gguf", b"other"), "bad", store=store)
    manifest = store.home / "manifests" / "bad" / "latest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"schema": 1', '"schema": 99'))
    assert [m.name for m in store.models()] == ["good"]
    assert "newer version" in told[0]
    store.collect_garbage()
    assert len(blobs(store)) == 2
    manifest.write_bytes(b"\xff\xfe")
    with pytest.raises(StoreError, match="damaged"):
        store.find("bad")
    store.remove("bad")
    assert [m.name for m in store.models()] == ["good"]
    assert len(blobs(store)) == 1


def test_a_manifest_under_another_name_is_damage(store: Store, tmp_path: Path) -> None:
    import_file(gguf(tmp_path), "a", store=store)
    manifests = store.home / "manifests"
    shutil.copytree(manifests / "a", manifests / "b")
    with pytest.raises(StoreError, match="it is that of a:latest"):
        store.find("b")


def test_abandoned_downloads_are_collected_after_a_week(store: Store) -> None:
    store.blobs.partial.mkdir(parents=True)
    week_ago = time.time() - PARTIAL_LIFETIME - 60
    for name, old in {"old.part": True, "old.lock": True, "live.part": False, "live.lock": True, "pip-x": True}.items():
        path = store.blobs.partial / name
        if name == "pip-x":
            path.mkdir()
            (path / "x.whl").write_text("x")
        else:
            path.write_text("x")
        if old:
            os.utime(path, (week_ago, week_ago))
    store.collect_garbage()
    assert {path.name for path in store.blobs.partial.iterdir()} == {"live.part", "live.lock"}


def test_paths_win_over_names_where_they_are_paths(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gguf(tmp_path)
    folder = checkpoint_folder(tmp_path / "tiny")
    import_file(path, "tiny", store=store)
    monkeypatch.chdir(tmp_path)
    assert resolve("tiny", store).manifest is not None  # a bare word is a name, whatever lies here
    for text in ("./tiny", str(folder), folder):
        assert resolve(text, store).path.samefile(folder)
        assert resolve(text, store).manifest is None
    assert resolve("tiny.gguf", store).path.samefile(path)
    for missing in ("missing.gguf", "./missing", str(tmp_path / "missing"), Path("missing"), "~/missing.safetensors"):
        with pytest.raises(StoreError, match=r"missing.* does not exist; give"):
            resolve(missing, store)
    (tmp_path / "owner").mkdir()
    assert resolve("owner", store).path.samefile(tmp_path / "owner")  # no stored model has that name


def test_names_that_are_not_stored_say_what_to_do(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="smollm2 is not in the model store; `puna pull smollm2` fetches it"):
        resolve("smollm2", store)
    with pytest.raises(StoreError, match="`puna pull owner/name:q4` fetches it"):
        resolve("owner/name:q4", store)
    import_file(gguf(tmp_path), "my-llama-tune", store=store)
    with pytest.raises(StoreError, match="did you mean my-llama-tune"):
        resolve("my-lama-tune", store)
    with pytest.raises(StoreError, match="`puna list` shows what is"):
        resolve("zzz", store)
    with pytest.raises(StoreError, match="is not a model name"):
        resolve("zz zz", store)


def test_names_of_the_catalog_are_one_model(store: Store, tmp_path: Path) -> None:
    import_file(gguf(tmp_path), "smollm2-135m-instruct", store=store)
    for text in ("smollm2", "SmolLM2:latest", "HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"):
        assert store.find(text).name == "smollm2-135m-instruct"
    import_file(gguf(tmp_path, "own.gguf", b"own"), "smollm2", store=store)
    assert store.find("smollm2").name == "smollm2"  # the user's own name wins


def test_pulling_a_path_imports_it(store: Store, tmp_path: Path) -> None:
    path = gguf(tmp_path)
    assert pull(str(path), store=store).source == str(path)
    assert pull(path, store=store, name="other").name == "other"


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert default_home().name == "puna"
    monkeypatch.setenv("PUNA_HOME", str(tmp_path / "x"))
    assert Store().home == tmp_path / "x"
    assert Store().models() == []
    assert not (tmp_path / "x").exists()
    monkeypatch.setenv("PUNA_HOME", "~/x")
    assert Store().home == Path.home() / "x"
