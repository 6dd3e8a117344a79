"""The safetensors container, against the `safetensors` package in both directions and on files that lie."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_weights, tiny_config

from puna.checkpoint.safetensors import INDEX_NAME, read_safetensors, write_safetensors
from puna.errors import CheckpointError
from puna.tensor import Weight

torch = pytest.importorskip("torch")
st_torch = pytest.importorskip("safetensors.torch")
SafetensorError = pytest.importorskip("safetensors").SafetensorError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
GOOD = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}


def raw_file(header: object, payload: bytes = bytes(22), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


def with_entry(**changes: object) -> dict:
    return GOOD | {"b": GOOD["b"] | changes}


def read_bytes(folder: Path, content: bytes) -> dict[str, Weight]:
    path = folder / "file.safetensors"
    path.write_bytes(content)
    return read_safetensors(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_the_package_writes(tmp_path: Path, dtype: str) -> None:
    tensors = {
        "matrix": torch.randn(5, 7).to(DTYPES[dtype]),
        "vector": torch.randn(3).to(DTYPES[dtype]),
        "cube": torch.randn(2, 3, 4).to(DTYPES[dtype]),
    }
    st_torch.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read = read_safetensors(tmp_path / "x.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].type.name == dtype
        np.testing.assert_array_equal(read[name].dequantize(), tensor.float().numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_package_reads_what_we_write(tmp_path: Path, dtype: str) -> None:
    weights = random_weights(tiny_config(), weight_type=dtype)
    write_safetensors(tmp_path, weights)
    read = st_torch.load_file(tmp_path / "model.safetensors")
    assert set(read) == set(weights)
    for name, weight in weights.items():
        assert read[name].dtype == DTYPES[weight.type.name]
        np.testing.assert_array_equal(read[name].float().numpy(), weight.dequantize())
    with pytest.importorskip("safetensors").safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files that lack it


def test_weights_are_views_of_the_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path, random_weights(tiny_config()))
    for weight in read_safetensors(tmp_path / "model.safetensors").values():
        assert not weight.data.flags.owndata
        assert not weight.data.flags.writeable


def test_shards_stay_below_the_limit_and_the_index_names_every_tensor(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    limit = 70_000
    write_safetensors(tmp_path, weights, max_shard_bytes=limit)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights.values())
    assert set(index["weight_map"]) == set(weights)
    shards = {path.name for path in tmp_path.glob("*.safetensors")}
    assert shards == set(index["weight_map"].values())
    assert len(shards) > 3
    for name, weight in weights.items():
        shard = st_torch.load_file(tmp_path / index["weight_map"][name])
        assert sum(t.numel() * 4 for t in shard.values()) <= limit
        np.testing.assert_array_equal(shard[name].numpy(), weight.dequantize())


def test_weight_type_changes_matrices_only(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    write_safetensors(tmp_path, weights, "bf16")
    for name, tensor in st_torch.load_file(tmp_path / "model.safetensors").items():
        expected = torch.from_numpy(weights[name].dequantize().copy())
        assert torch.equal(tensor, expected.bfloat16() if tensor.ndim == 2 else expected)


def test_quantized_matrices_become_f16(tmp_path: Path) -> None:
    weight = Weight.from_array("w", np.random.default_rng(0).standard_normal((4, 64), dtype=np.float32), "Q8_0")
    write_safetensors(tmp_path, {"w": weight})
    read = st_torch.load_file(tmp_path / "model.safetensors")["w"]
    assert read.dtype == torch.float16
    np.testing.assert_array_equal(read.numpy(), weight.dequantize().astype(np.float16))


def test_large_matrices_are_recoded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puna.checkpoint.recode._CHUNK_NUMBERS", 100)
    weight = Weight.from_array("w", np.random.default_rng(0).standard_normal((17, 32), dtype=np.float32))
    write_safetensors(tmp_path, {"w": weight}, "BF16")
    read = st_torch.load_file(tmp_path / "model.safetensors")["w"]
    assert torch.equal(read, torch.from_numpy(weight.dequantize().copy()).bfloat16())


def test_refuses_to_write_quantized_types(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not Q4_0.*\.gguf"):
        write_safetensors(tmp_path, random_weights(tiny_config()), "Q4_0")


def test_the_template_of_the_hostile_files_is_itself_good(tmp_path: Path) -> None:
    assert set(read_bytes(tmp_path, raw_file(GOOD))) == {"a", "b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"\0\0\0", "3 bytes"),
        (raw_file(GOOD, length=2**63), "claims 9223372036854775808 bytes"),
        (raw_file(GOOD, length=100_000_001), "claims"),
        (raw_file(GOOD)[:40], "truncated"),
        (raw_file(b"{" * 100_000), "not valid JSON"),
        (raw_file(b"[" * 100_000), "not valid JSON"),
        (raw_file(b"\xff\xfe{}"), "not valid JSON"),
        (raw_file(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
        (raw_file([]), "not a JSON object"),
        (raw_file({"a": 3}), "a: its header entry"),
        (raw_file(b'{"a": {}, "a": {}}'), "names 'a' twice"),
        (raw_file(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "names 'dtype' twice"),
        (raw_file(with_entry(dtype="F8_E5M2")), "b has dtype 'F8_E5M2'; supported: F32, F16, BF16"),
        (raw_file(with_entry(dtype=["F32"])), "b has dtype"),
        (raw_file(with_entry(shape=[-3])), "b: shape"),
        (raw_file(with_entry(shape=[1.5])), "b: shape"),
        (raw_file(with_entry(shape=[True])), "b: shape"),
        (raw_file(with_entry(shape=None)), "b: shape"),
        (raw_file(with_entry(shape=[1] * 100)), "b: shape"),
        (raw_file(with_entry(shape=[2**62, 2**62])), "b: BF16 of shape"),
        (raw_file(with_entry(shape=[4])), "needs 8 bytes, its offsets span 6"),
        (raw_file(with_entry(data_offsets=[22, 16])), "b: data_offsets"),
        (raw_file(with_entry(data_offsets=[16])), "b: data_offsets"),
        (raw_file(with_entry(data_offsets=[10, 16])), "b overlaps the tensor before it"),
        (raw_file(with_entry(data_offsets=[18, 24]), bytes(24)), "b leaves a gap"),
        (raw_file(GOOD, bytes(21)), "need 22 bytes after the header, the file has 21"),
        (raw_file(GOOD, bytes(23)), "need 22 bytes after the header, the file has 23"),
        (raw_file({}, b"x"), "need 0 bytes"),
    ],
)
def test_refuses_files_that_lie(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")):
        read_bytes(tmp_path, content)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_is_refused_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(raw_file(GOOD))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        tensors = read_bytes(folder, bytes(content))
    except CheckpointError:
        return
    for weight in tensors.values():
        weight.dequantize()
    # What we accept, the reference implementation accepts too.
    st_torch.load_file(folder / "file.safetensors")
