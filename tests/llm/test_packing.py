"""Models that start from their packed files compute the very same, and any other file in that place is passed over."""

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import tiny_checkpoint, tiny_config

import puna
import puna.llm.packing
from puna.checkpoint import open_checkpoint, save_checkpoint
from puna.errors import CheckpointError, RequestError
from puna.llm import scoring
from puna.llm.packing import bind_model, pack_model
from puna.model.model import Model
from puna.ops.native_ops import NativeOps
from puna.ops.reference import ReferenceOps
from puna.store import ResolvedModel, Store, import_file, resolve

IDS = list(range(3, 30))


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    save_checkpoint(tiny_checkpoint(), path, "gguf", "Q8_0")
    return path


def bind(found: ResolvedModel, *, packed: bool = True) -> Model:
    return bind_model(NativeOps(threads=1), found, open_checkpoint(found.path), packed=packed)


def logits(found: ResolvedModel, *, packed: bool = True) -> NDArray[np.float32]:
    return scoring.logits(bind(found, packed=packed), IDS, None)


def assert_passed_over(found: ResolvedModel, problem: str) -> None:
    """One warning, and the logits of a model that has no packed file."""
    with pytest.warns(UserWarning, match=problem) as caught:
        values = logits(found)
    assert len(caught) == 1
    assert np.array_equal(values, logits(found, packed=False))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("weight_type", "form"), [("Q8_0", "gguf"), ("F16", "gguf"), ("BF16", "safetensors")])
def test_the_logits_are_the_same(tmp_path: Path, tied: bool, weight_type: str, form: str) -> None:
    path = tmp_path / ("tiny.gguf" if form == "gguf" else "tiny")
    save_checkpoint(tiny_checkpoint(tiny_config(tie_word_embeddings=tied)), path, form, weight_type)
    found = resolve(path)
    assert pack_model(found, NativeOps(threads=1)) == tmp_path / f"{path.name}.packed"
    assert np.array_equal(logits(found), logits(found, packed=False))
    model = bind(found)
    assert all(matrix.panels is not None for matrix in (model.weights.head, model.weights.blocks[1].q))
    assert model.weights.blocks[1].q.source is None  # not even read
    assert (model.weights.embedding.panels is not None) == tied


def test_every_instruction_set_makes_and_reads_the_same_file(model_file: Path) -> None:
    from puna import _native

    found = resolve(model_file)
    files = {pack_model(found, NativeOps(1, isa)).read_bytes() for isa in _native.instruction_sets()}
    assert len(files) == 1


def test_a_file_in_a_chosen_place_is_used_where_it_is_named(model_file: Path, tmp_path: Path) -> None:
    found, out = resolve(model_file), tmp_path / "elsewhere"
    expected = logits(found)
    assert pack_model(found, NativeOps(threads=1), out) == out
    assert not found.packed.exists()
    checkpoint = open_checkpoint(model_file)
    model = bind_model(NativeOps(threads=1), found, checkpoint, packed=out)
    assert model.weights.blocks[1].q.source is None
    assert np.array_equal(scoring.logits(model, IDS, None), expected)
    with pytest.raises(RequestError, match="the reference ops use no packed file"):
        bind_model(ReferenceOps(), found, checkpoint, packed=out)
    with pytest.raises(CheckpointError, match="cannot be read"):
        bind_model(NativeOps(threads=1), found, checkpoint, packed=tmp_path / "nowhere")
    os.utime(model_file, ns=(1, 1))
    with pytest.raises(CheckpointError, match="the model has changed since"):
        bind_model(NativeOps(threads=1), found, checkpoint, packed=out)
    assert pack_model(found, NativeOps(threads=1), out) == out  # a packed file may be replaced


def test_no_other_file_is_written_over(model_file: Path) -> None:
    before = model_file.read_bytes()
    with pytest.raises(RequestError, match="no packed file; choose another name"):
        pack_model(resolve(model_file), NativeOps(threads=1), model_file)
    assert model_file.read_bytes() == before


def test_a_changed_model_is_packed_as_if_there_were_no_file(model_file: Path) -> None:
    found = resolve(model_file)
    pack_model(found, NativeOps(threads=1))
    save_checkpoint(tiny_checkpoint(seed=1), model_file, "gguf", "Q8_0")
    os.utime(model_file, ns=(1, 1))
    assert_passed_over(found, "the model has changed since")


def test_another_layout_a_cut_file_and_rubbish_are_passed_over(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = resolve(model_file)
    pack_model(found, NativeOps(threads=1))
    with monkeypatch.context() as patch:
        patch.setattr(NativeOps, "panel_layout", NativeOps.panel_layout + 1)
        assert_passed_over(found, "panel layout")
    whole = found.packed.read_bytes()
    found.packed.write_bytes(whole[:-64])
    assert_passed_over(found, "its header says")
    found.packed.write_bytes(b"")
    assert_passed_over(found, "no packed file")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rows": 16}, "no matrix 'model.layers.0.mlp.up_proj.weight' of that shape"),
        ({"name": "model.norm.weight"}, "no matrix 'model.norm.weight' of that shape"),
        ({"type": "Q9"}, "unknown type 'Q9'"),
        ({"type": "F32"}, "which its shape does not call for"),
        ({"size": 0}, "which its shape does not call for"),
    ],
)
def test_a_matrix_that_is_not_the_model_s_is_passed_over(
    model_file: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], problem: str
) -> None:
    """The header is sound but for what it says of one matrix."""
    found = resolve(model_file)
    with monkeypatch.context() as patch:
        encode = puna.ops.packed_file.asdict

        def lie(matrix: object) -> dict[str, object]:
            true = encode(matrix)
            return true | change if true["name"] == "model.layers.0.mlp.up_proj.weight" and true["offset"] else true

        patch.setattr(puna.ops.packed_file, "asdict", lie)
        pack_model(found, NativeOps(threads=1))
    assert_passed_over(found, problem)


def test_reference_ops_have_no_use_for_packed_files(model_file: Path) -> None:
    found = resolve(model_file)
    with pytest.raises(RequestError, match="reference ops pack nothing"):
        pack_model(found, ReferenceOps())
    found.packed.write_bytes(b"rubbish")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bind_model(ReferenceOps(), found, open_checkpoint(found.path), packed=True)


def test_a_full_disk_leaves_nothing_behind(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(model_file.parent.iterdir())
    pack = NativeOps.pack
    monkeypatch.setattr(NativeOps, "pack", lambda *a: full() if "mlp.down" in a[1].name else pack(*a))
    with pytest.raises(CheckpointError, match="No space left"):
        pack_model(resolve(model_file), NativeOps(threads=1))
    assert sorted(model_file.parent.iterdir()) == before


KILLED = """
import os, signal, sys
from puna.llm.packing import pack_model
from puna.ops.native_ops import NativeOps
from puna.store import resolve
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
pack_model(resolve(sys.argv[1]), NativeOps(threads=1))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is of POSIX systems")
def test_a_kill_before_the_rename_leaves_no_packed_file(model_file: Path) -> None:
    found = resolve(model_file)
    assert subprocess.run([sys.executable, "-c", KILLED, str(model_file)], env=environment()).returncode == -9
    assert not found.packed.exists()
    pack_model(found, NativeOps(threads=1))
    assert np.array_equal(logits(found), logits(found, packed=False))


def test_two_processes_may_pack_at_once(model_file: Path) -> None:
    command = [sys.executable, "-m", "puna", "pack", str(model_file)]
    processes = [subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    found = resolve(model_file)
    assert sorted(model_file.parent.iterdir()) == [model_file, found.packed]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(logits(found), logits(found, packed=False))


def test_a_stored_model_s_file_goes_with_its_last_name(model_file: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    import_file(model_file, "mine", store=store)
    store.copy("mine", "copy")
    found = resolve("mine", store)
    pack_model(found, NativeOps(threads=1))
    assert found.packed.parent == store.home / "packed"
    size = found.packed.stat().st_size
    assert resolve("copy", store).packed == found.packed
    assert np.array_equal(logits(found), logits(found, packed=False))
    store.remove("mine")
    assert found.packed.exists()
    assert store.remove("copy") == size  # the blob is a second link to the imported file
    assert not found.packed.exists()


def test_garbage_collection_takes_what_killed_processes_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.packs.folder.mkdir()
    live, left, foreign = (store.packs.folder / n for n in (".a.packed.1.partial", ".a.packed.2.partial", "b.packed"))
    for path in (live, left, foreign):
        path.write_bytes(b"12345")
    os.utime(left, (1, 1))
    assert store.collect_garbage() == 10
    assert list(store.packs.folder.iterdir()) == [live]


@pytest.fixture
def stored(tmp_path: Path) -> list[ResolvedModel]:
    """Three stored models whose packed files are equally large."""
    store = Store(tmp_path / "home")
    for seed in range(3):
        path = tmp_path / f"{seed}.gguf"
        save_checkpoint(tiny_checkpoint(seed=seed), path, "gguf", "Q8_0")
        import_file(path, f"model{seed}", store=store)
    return [resolve(f"model{seed}", store) for seed in range(3)]


def test_the_cache_keeps_the_packs_used_last(stored: list[ResolvedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    bind(stored[0])
    assert not stored[0].packed.exists()  # off by default
    monkeypatch.setenv("PUNA_PACK_CACHE", "1GB")
    for age, found in enumerate(stored[:2]):
        assert bind(found).weights.blocks[0].q.source is None  # made and used at once
        os.utime(found.packed, (1000 + age, 1000 + age))
    size = stored[0].packed.stat().st_size
    bind(stored[0])  # the other one is the least recently used from now on
    monkeypatch.setenv("PUNA_PACK_CACHE", str(5 * size // 2))
    assert np.array_equal(logits(stored[2]), logits(stored[2], packed=False))
    assert [found.packed.exists() for found in stored] == [True, False, True]


def test_a_model_larger_than_the_cache_displaces_nothing(
    stored: list[ResolvedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_model(stored[0], NativeOps(threads=1))
    monkeypatch.setenv("PUNA_PACK_CACHE", "1kB")
    bind(stored[1])
    assert [found.packed.exists() for found in stored] == [True, False, False]


def test_the_cache_leaves_paths_alone(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUNA_PACK_CACHE", "1GB")
    bind(resolve(model_file))
    assert list(model_file.parent.iterdir()) == [model_file]


def test_a_cache_that_cannot_be_written_costs_a_warning(
    stored: list[ResolvedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUNA_PACK_CACHE", "1GB")
    stored[0].packed.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="model0:latest was not packed"):
        bind(stored[0])


@pytest.mark.parametrize("text", ["much", "4XB", "-1", "1.5GB", "4 4", "9" * 99])
def test_a_bound_that_is_no_size_is_told(
    stored: list[ResolvedModel], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("PUNA_PACK_CACHE", text)
    with pytest.raises(RequestError, match="PUNA_PACK_CACHE must be a size such as 4GB"):
        bind(stored[0])


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(puna.__file__).parents[1])}
