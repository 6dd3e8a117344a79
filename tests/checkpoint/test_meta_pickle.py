"""The restricted unpickler and the torch archive around it: the same tensors as torch.load, and nothing is ever run."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_weights, tiny_config

from puna.checkpoint import pickle_reader
from puna.checkpoint.pickle_reader import Storage, StoredTensor, unpickle
from puna.checkpoint.recode import encoded_pieces
from puna.checkpoint.torch_zip import TorchFile, TorchWriter, _pickle
from puna.errors import CheckpointError

torch = pytest.importorskip("torch")


def save(path: Path, value: object, **options: object) -> Path:
    torch.save(value, path, **options)
    return path


def archive(path: Path, data_pkl: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr("m/data.pkl", data_pkl)
        for key, content in storages.items():
            out.writestr(f"m/data/{key}", content)
    return path


def tensor_pickle(
    shape: tuple = (2, 3), stride: tuple = (3, 1), offset: int = 0, count: int = 6, **other: object
) -> bytes:
    """A state dict {"w": tensor} as torch pickles it, with numbers of our choosing."""
    storage = other.get("storage", torch.FloatStorage)

    class Reference:
        pass

    class Tensor:
        def __reduce__(self) -> tuple:
            return torch._utils._rebuild_tensor_v2, (Reference(), offset, shape, stride, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: object) -> object:
            return ("storage", storage, other.get("key", "0"), "cpu", count) if isinstance(item, Reference) else None

    out = io.BytesIO()
    Pickler(out, protocol=int(other.get("protocol", 2))).dump({"w": Tensor()})
    return out.getvalue()


class RunsCommand:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


class Evaluates:
    def __reduce__(self) -> tuple:
        return eval, ("__import__('os').mkdir('executed')",)


# --- agreement with torch ---------------------------------------------------------------------------------------------


def test_shared_checkpoint_equals_torch(shared_data: Path) -> None:
    path = shared_data / "weights" / "tiny_fair_checkpoint.pt"
    expected = torch.load(path, weights_only=True)
    read = TorchFile(path)
    assert len(read) == 21
    assert list(read) == list(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(read[name].dequantize(), tensor.numpy())
        assert not read[name].data.flags.owndata  # a view of the file


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_float_type_and_view(tmp_path: Path, dtype: object) -> None:
    base = torch.randn(6, 8).to(dtype)
    tensors = {
        "plain": torch.randn(3, 5).to(dtype),
        "base": base,
        "rows": base[2:4],
        "transposed": base.T,
        "columns": base[:, 3:6],
        "every_other": base[::2, ::2],
        "vector": base[1],
        "column_vector": base[:, 1],
        "permuted": torch.randn(2, 3, 4).to(dtype).permute(2, 0, 1),
        "single_row": base[:, 2:3].T,
        "empty": torch.empty(0, 4).to(dtype),
    }
    path = save(tmp_path / "x.pth", tensors)
    read = TorchFile(path)
    for name, tensor in tensors.items():
        assert read[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(read[name].dequantize(), tensor.float().numpy())


def test_module_state_dict_with_its_metadata(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    read = TorchFile(save(tmp_path / "x.pth", module.state_dict()))
    np.testing.assert_array_equal(read["0.weight"].dequantize(), module[0].weight.detach().numpy())


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickle_protocols(tmp_path: Path, protocol: int) -> None:
    path = save(tmp_path / "x.pth", {"w": torch.arange(6.0).reshape(2, 3)}, pickle_protocol=protocol)
    np.testing.assert_array_equal(TorchFile(path)["w"].dequantize(), [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_torch_loads_what_we_write(tmp_path: Path, kind: str) -> None:
    weights = random_weights(tiny_config(), weight_type=kind)
    path = tmp_path / "consolidated.00.pth"
    writer = TorchWriter(path)
    for name, weight in weights.items():
        writer.add(name, weight.shape, weight.type, encoded_pieces(weight, weight.type))
    writer.add_alias("again", "lm_head.weight")
    writer.close()
    for mapped in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mapped)
        assert set(loaded) == {*weights, "again"}
        for name, weight in weights.items():
            np.testing.assert_array_equal(loaded[name].float().numpy(), weight.dequantize())
        assert loaded["again"].data_ptr() == loaded["lm_head.weight"].data_ptr()  # stored once
    read = TorchFile(path)
    assert read.same_storage("again", "lm_head.weight")
    assert not read.same_storage("again", "model.norm.weight")
    with zipfile.ZipFile(path) as whole:
        assert whole.testzip() is None


def test_sizes_beyond_32_bits_are_pickled_exactly() -> None:
    shape = (2**20, 2**13)
    content = unpickle(_pickle([("w", "BF16", 2**33, shape, "0")]), "test")
    assert content == {"w": StoredTensor(Storage("0", "BF16", 2**33), 0, shape, (2**13, 1))}


# --- nothing is run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("evil", [RunsCommand(), Evaluates()], ids=["os.system", "eval"])
def test_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evil: object, protocol: int) -> None:
    monkeypatch.chdir(tmp_path)
    expected = r"refers to '(posix|nt|builtins|__builtin__)\.(system|eval)'" if protocol else "uses DICT"
    with pytest.raises(CheckpointError, match=expected):
        unpickle(pickle.dumps({"w": evil}, protocol=protocol), "x.pth")
    with pytest.raises(CheckpointError, match=r"system|eval|uses"):
        TorchFile(archive(tmp_path / "x.pth", pickle.dumps(evil, protocol=protocol), {}))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name",
    [
        "torch.load",
        "torch.LongStorage",
        "torch._utils._rebuild_parameter",
        "torch.storage._load_from_bytes",
        "collections.OrderedDict.fromkeys",
        "functools.partial",
        "numpy.core.multiarray._reconstruct",
    ],
)
def test_any_other_name_is_refused_by_name(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    with pytest.raises(CheckpointError, match=f"refers to '{name}'"):
        unpickle(f"\x80\x02c{module}\n{attribute}\n)R.".encode("latin1"), "x.pth")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "malformed|too early"),
        (b"\x80\x02", "malformed|too early"),
        (b"\x80\x02}", "malformed|too early"),
        (b".", "malformed"),
        (b"(.", "malformed"),
        (b"\x80\x02ccollections\nOrderedDict\n(K\x01tR.", "malformed"),  # arguments
        (b"\x80\x02K\x01)R.", "malformed"),  # calling a number
        (b"\x80\x02}K\x01)R.", "malformed"),
        (b"\x80\x02}h\x07.", "malformed"),  # a memo entry that does not exist
        (b"\x80\x02}(K\x01u.", "malformed"),  # a key without a value
        (b"\x80\x02}]K\x01s.", "malformed"),  # a list as key
        (b"\x80\x02U\x03abcQ.", "uses SHORT_BINSTRING"),
        (b"\x80\x02X\x03\0\0\0abcQ.", "malformed"),  # a text as storage
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "malformed"),  # a text longer than the file
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "malformed|uses"),
        (b"\x80\x02X\x02\0\0\0\xff\xfe.", "malformed"),  # not UTF-8
        (b"cos\n", "malformed"),
        (b"(ios\nsystem\n.", "uses INST"),
        (b"\x80\x02}\x81.", "uses NEWOBJ"),
        (b"\x82\x01.", "uses EXT1"),
        (b"Pid\n.", "uses PERSID"),
        (b"I" + b"9" * 10_000 + b"\n.", "malformed"),
        (bytes(pickle_reader.MAX_PICKLE_BYTES + 1), "at most"),
    ],
)
def test_malformed_pickles(data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        unpickle(data, "x.pth")


def test_a_huge_memo_index_costs_nothing() -> None:
    assert unpickle(b"\x80\x02}r\xff\xff\xff\xff.", "x.pth") == {}


def test_deep_nesting_is_no_stack_overflow() -> None:
    depth = 100_000
    assert isinstance(unpickle(b"\x80\x02)" + b"\x85" * depth + b".", "x.pth"), tuple)
    with pytest.raises(CheckpointError):  # hashing it as a key would overflow the C stack
        unpickle(b"\x80\x02})" + b"\x85" * depth + b"K\x01s.", "x.pth")


def test_shared_structure_does_not_explode_in_messages(tmp_path: Path) -> None:
    doubling = b"\x80\x02}" + b"X\x01\0\0\0w" + b"]" + b"q\0h\0\x86" * 60 + b"s."
    with pytest.raises(CheckpointError, match="'w' is not a float tensor"):
        TorchFile(archive(tmp_path / "x.pth", doubling, {}))


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": (2**40, 2**40), "stride": (1, 1)},
        {"shape": (2, 4)},
        {"offset": 1},
        {"offset": -1},
        {"stride": (-3, 1)},
        {"shape": (-2, 3)},
        {"shape": (2, 3, 1)},
        {"stride": (2**62, 1)},
        {"shape": (10**6, 10**6), "stride": (0, 0)},
        {"shape": (2.0, 3)},
        {"shape": (True, 3)},
        {"shape": "ab"},
        {"shape": (), "stride": ()},
        {"shape": (1,) * 80, "stride": (1,) * 80},
        {"count": -6},
        {"count": 5},
        {"count": 10**30},
        {"count": "6"},
        {"key": 0},
    ],
)
def test_impossible_views_are_refused(tmp_path: Path, lie: dict) -> None:
    assert np.all(TorchFile(archive(tmp_path / "good.pth", tensor_pickle(), {"0": bytes(24)}))["w"].dequantize() == 0)
    with pytest.raises(CheckpointError):
        TorchFile(archive(tmp_path / "x.pth", tensor_pickle(**lie), {"0": bytes(24)}))


# --- the archive -----------------------------------------------------------------------------------------------------


def test_storage_smaller_than_claimed_or_absent(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="w needs a storage of 24 bytes, the archive holds 20"):
        TorchFile(archive(tmp_path / "x.pth", tensor_pickle(), {"0": bytes(20)}))
    with pytest.raises(CheckpointError, match="numbers of w are missing"):
        TorchFile(archive(tmp_path / "x.pth", tensor_pickle(key="../../etc/passwd"), {"0": bytes(24)}))


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    bomb = archive(tmp_path / "x.pth", tensor_pickle(), {"0": bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        TorchFile(bomb)


def test_sizes_in_the_directory_that_lie(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.pth", tensor_pickle(), {"0": bytes(24)})
    content = path.read_bytes()
    entry = content.rindex(b"PK\x01\x02")
    huge = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(content[: entry + 20] + huge + content[entry + 28 :])
    with pytest.raises(CheckpointError, match="past the end of the file"):
        TorchFile(path)


def test_old_torch_format_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "x.pth", {"w": torch.zeros(3)}, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before version 1\.6.*save it again"):
        TorchFile(path)


@pytest.mark.parametrize("value", [{"w": 3}, {"w": {"v": 1}}, [1], "text", {1: 2}])
def test_other_contents_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"not a float tensor|expected a dictionary"):
        TorchFile(save(tmp_path / "x.pth", value))


def test_wrong_archives(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    for content in (b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"no archive at all" * 100):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            TorchFile(path)
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("m/data.pkl", tensor_pickle())
        with pytest.warns(UserWarning, match="Duplicate"):
            out.writestr("m/data.pkl", tensor_pickle())
    with pytest.raises(CheckpointError, match="twice"):
        TorchFile(path)
    with zipfile.ZipFile(path, "w") as out:
        out.writestr("m/data.pkl", tensor_pickle())
        out.writestr("m/data/0", bytes(24))
        out.writestr("m/byteorder", "big")
    with pytest.raises(CheckpointError, match="big-endian"):
        TorchFile(path)


def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    content = save(tmp_path / "x.pth", {"w": torch.randn(3, 4)}).read_bytes()
    for length in range(0, len(content), 7):
        (tmp_path / "x.pth").write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            TorchFile(tmp_path / "x.pth")


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damaged_archives_are_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    content = bytearray(archive(folder / "x.pth", tensor_pickle(), {"0": bytes(24)}).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "x.pth").write_bytes(content)
    with suppress(CheckpointError):
        for weight in TorchFile(folder / "x.pth").values():
            weight.dequantize()


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from([bytes([i]) for i in range(256)]) | st.sampled_from([b"ccollections\nOrderedDict\n"])))
def test_random_opcodes_are_refused_or_harmless(opcodes: list[bytes]) -> None:
    with suppress(CheckpointError):
        unpickle(b"\x80\x02" + b"".join(opcodes) + b".", "x.pth")
