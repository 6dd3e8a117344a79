"""The GGUF container: files by the gguf package are read exactly; damaged and hostile ones give one clear sentence."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna import gguf_file
from puna.checkpoint.gguf_writer import write_gguf
from puna.errors import CheckpointError
from puna.gguf_file import read_gguf
from puna.tensor import QUANT_TYPES

gguf = pytest.importorskip("gguf")

UINT8, INT32, UINT32, FLOAT32, STRING, ARRAY = 0, 5, 4, 6, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def container(
    values: list[bytes] = (), tensors: list[bytes] = (), data: bytes = b"", version: int = 3, counts: Any = None
) -> bytes:
    counts = counts or (len(tensors), len(values))
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(values) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


def read_bytes(folder: Path, content: bytes) -> gguf_file.GGUFFile:
    path = folder / "file.gguf"
    path.write_bytes(content)
    return read_gguf(path)


def written_by_peer(path: Path, **writer_arguments: Any) -> dict[str, np.ndarray]:
    """A file with every value type and several tensor types, by the gguf package."""
    writer = gguf.GGUFWriter(path, "llama", **writer_arguments)
    writer.add_uint8("k.u8", 255)
    writer.add_int8("k.i8", -128)
    writer.add_uint16("k.u16", 65535)
    writer.add_int16("k.i16", -32768)
    writer.add_uint32("k.u32", 2**32 - 1)
    writer.add_int32("k.i32", -(2**31))
    writer.add_uint64("k.u64", 2**64 - 1)
    writer.add_int64("k.i64", -(2**63))
    writer.add_float32("k.f32", 0.25)
    writer.add_float64("k.f64", 1e300)
    writer.add_bool("k.bool", True)
    writer.add_string("k.string", "Llama 🦙 ünd")
    writer.add_array("k.strings", ["", "a", "▁the", "Ġ" * 300])
    writer.add_array("k.numbers", [1, -2, 3])
    writer.add_array("k.fractions", [0.5, -1.25])
    writer.add_array("k.flags", [True, False, True])
    writer.add_array("k.nested", [[1, 2], [3]])
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape, kind in (
        ("a", (3, 64), "F32"),
        ("b", (5,), "F32"),
        ("c", (2, 64), "Q4_0"),
        ("d", (2, 3, 32), "Q8_0"),
        ("e", (4, 7), "F16"),
        ("f", (2, 512), "Q6_K"),
    ):
        if kind == "Q6_K":
            packed = rng.integers(0, 128, (2, 420), dtype=np.uint8)
        else:
            packed = gguf.quants.quantize(
                rng.standard_normal(shape).astype(np.float32), gguf.GGMLQuantizationType[kind]
            )
        tensors[name] = packed
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


class TestReading:
    def test_every_value_type(self, tmp_path: Path) -> None:
        written_by_peer(tmp_path / "m.gguf")
        metadata = read_gguf(tmp_path / "m.gguf").metadata
        assert metadata == {
            "general.architecture": "llama",
            "k.u8": 255,
            "k.i8": -128,
            "k.u16": 65535,
            "k.i16": -32768,
            "k.u32": 2**32 - 1,
            "k.i32": -(2**31),
            "k.u64": 2**64 - 1,
            "k.i64": -(2**63),
            "k.f32": 0.25,
            "k.f64": 1e300,
            "k.bool": True,
            "k.string": "Llama 🦙 ünd",
            "k.strings": ["", "a", "▁the", "Ġ" * 300],
            "k.numbers": [1, -2, 3],
            "k.fractions": [0.5, -1.25],
            "k.flags": [True, False, True],
            "k.nested": [[1, 2], [3]],
        }

    def test_strings_are_read_when_they_are_asked_for(self, tmp_path: Path) -> None:
        written_by_peer(tmp_path / "m.gguf")
        strings = read_gguf(tmp_path / "m.gguf").metadata["k.strings"]
        assert isinstance(strings, gguf_file.TextArray)
        assert (len(strings), strings[1], strings[-1], list(strings)) == (4, "a", "Ġ" * 300, strings.tolist())
        assert strings == gguf_file.TextArray.of(strings.tolist())
        assert strings != ["", "a"]
        write_gguf(tmp_path / "again.gguf", {"k": strings}, {}, lambda name: (QUANT_TYPES["F32"], []))
        assert read_gguf(tmp_path / "again.gguf").metadata["k"] == strings

    @pytest.mark.parametrize("raw", [b"\x80", b"\xc1\x81", b"\xe0\x9f\xbf", b"\xed\xa0\x80", b"\xf0\x8f\xbf\xbf"])
    @pytest.mark.parametrize("follow", [b"", b"a"])
    def test_strings_that_are_no_utf8(self, tmp_path: Path, raw: bytes, follow: bytes) -> None:
        payload = struct.pack("<IQ", STRING, 2) + text("a") + text(raw + follow)
        with pytest.raises(CheckpointError, match="k is not valid UTF-8"):
            read_bytes(tmp_path, container([value("k", ARRAY, payload)]))

    @given(st.binary(max_size=6))
    def test_strings_are_judged_as_python_judges_them(self, raw: bytes) -> None:
        skip_strings = pytest.importorskip("puna._native").skip_strings
        try:
            raw.decode()
            end = len(text(raw))
        except UnicodeDecodeError:
            end = None
        assert skip_strings(text(raw), 0, 100, 1) == end

    def test_tensors_are_views_of_the_file(self, tmp_path: Path) -> None:
        written = written_by_peer(tmp_path / "m.gguf")
        tensors = read_gguf(tmp_path / "m.gguf").tensors
        assert list(tensors) == list(written)
        shapes = {name: (w.shape, w.type.name) for name, w in tensors.items()}
        assert shapes["a"] == ((3, 64), "F32")
        assert shapes["d"] == ((2, 3, 32), "Q8_0")
        assert shapes["f"] == ((2, 512), "Q6_K")
        for name, weight in tensors.items():
            np.testing.assert_array_equal(weight.data, written[name].view(np.uint8))
            assert not weight.data.flags.writeable
            assert not weight.data.flags.owndata

    def test_another_alignment(self, tmp_path: Path) -> None:
        data = b"".join(np.float32([number]).tobytes().ljust(4) for number in (1.0, 2.0))
        tensors = [tensor("a", (1,)), tensor("b", (1,), offset=4)]
        header = container([value("general.alignment", UINT32, struct.pack("<I", 4))], tensors).rstrip(b"\0")
        padded = header + bytes(7)  # the last offset ends in seven zero bytes that rstrip took
        start = len(padded) + -len(padded) % 4
        file = read_bytes(tmp_path, padded.ljust(start, b"\0") + data)
        assert [float(w.dequantize()[0]) for w in file.tensors.values()] == [1.0, 2.0]

    def test_version_2(self, tmp_path: Path) -> None:
        file = read_bytes(tmp_path, container([value("k", UINT32, b"\1\0\0\0")], version=2))
        assert file.metadata == {"k": 1}

    def test_real_vocabulary(self, shared_data: Path) -> None:
        path = shared_data / "tokenizers" / "ggml-vocab-llama-spm.gguf"
        file = read_gguf(path)
        theirs = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if "GGUF." not in name}
        assert file.metadata == theirs
        assert file.tensors == {}

    def test_real_large_vocabulary(self, shared_data: Path) -> None:
        metadata = read_gguf(shared_data / "tokenizers" / "ggml-vocab-llama-bpe.gguf").metadata
        tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
        assert (len(tokens), len(merges)) == (128256, 280147)
        assert [tokens[0], tokens[128000], tokens[128009]] == ["!", "<|begin_of_text|>", "<|eot_id|>"]
        assert merges[0] == "Ġ Ġ"

    def test_real_model(self, smollm2_path: Path) -> None:
        file, theirs = read_gguf(smollm2_path), gguf.GGUFReader(smollm2_path)
        assert file.metadata == {n: f.contents() for n, f in theirs.fields.items() if not n.startswith("GGUF.")}
        assert list(file.tensors) == [t.name for t in theirs.tensors]
        for peer in theirs.tensors:
            ours = file.tensors[peer.name]
            assert ours.shape == tuple(int(n) for n in reversed(peer.shape))
            expected = gguf.quants.dequantize(peer.data, peer.tensor_type).view(np.uint32)
            np.testing.assert_array_equal(ours.dequantize().view(np.uint32), expected.reshape(ours.shape))


class TestSplitFiles:
    def split(self, folder: Path) -> list[Path]:
        written_by_peer(folder / "m.gguf", split_max_tensors=2)
        paths = sorted(folder.glob("m-*.gguf"))
        assert [p.name for p in paths] == [f"m-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
        return paths

    @pytest.mark.parametrize("part", [0, 1, 2])
    def test_any_part_opens_all(self, tmp_path: Path, part: int) -> None:
        whole = written_by_peer(tmp_path / "whole.gguf")
        file = read_gguf(self.split(tmp_path)[part])
        assert file.metadata == read_gguf(tmp_path / "whole.gguf").metadata
        assert list(file.tensors) == list(whole)
        for name, weight in file.tensors.items():
            np.testing.assert_array_equal(weight.data, whole[name].view(np.uint8))

    def test_missing_parts_are_named(self, tmp_path: Path) -> None:
        paths = self.split(tmp_path)
        paths[1].unlink()
        with pytest.raises(CheckpointError, match=r"1 of 3 parts are missing beside it: m-00002-of-00003\.gguf"):
            read_gguf(paths[0])

    def test_a_renamed_part_says_what_is_wrong(self, tmp_path: Path) -> None:
        path = self.split(tmp_path)[0].rename(tmp_path / "model.gguf")
        with pytest.raises(CheckpointError, match="one of 3 parts"):
            read_gguf(path)

    def test_exchanged_parts_are_noticed(self, tmp_path: Path) -> None:
        paths = self.split(tmp_path)
        paths[1].rename(tmp_path / "x")
        paths[2].rename(paths[1])
        (tmp_path / "x").rename(paths[2])
        with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf: expected split\.no 1 .* found 2 and 3"):
            read_gguf(paths[0])

    def test_the_same_tensor_in_two_parts(self, tmp_path: Path) -> None:
        for part in range(2):
            numbers = {"split.no": part, "split.count": 2}
            values = [value(key, UINT32, struct.pack("<I", number)) for key, number in numbers.items()]
            content = container(values, [tensor("a", (8,))], bytes(32))
            (tmp_path / f"m-0000{part + 1}-of-00002.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match="tensor a is in an earlier part too"):
            read_gguf(tmp_path / "m-00001-of-00002.gguf")


F32_BLOCK = bytes(32)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "does not begin with the letters GGUF"),
    "another format": (b"PK\3\4" + bytes(100), "does not begin with the letters GGUF"),
    "a pointer to a file not fetched": (b"version https://git-lfs.github.com/spec/v1\n", "does not begin with"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (container(version=1), "version 1 is not supported"),
    "version 4": (container(version=4), "version 4 is not supported"),
    "nothing after the magic": (b"GGUF", "ends inside its header"),
    "metadata that is not there": (container(counts=(0, 1)), "ends inside its header|more than fit"),
    "2^62 metadata values": (container(counts=(0, 2**62)), f"claims {2**62} metadata values"),
    "2^64-1 tensors": (container(counts=(2**64 - 1, 0)), f"claims {2**64 - 1} tensors"),
    "a key of 2^63 bytes": (container([struct.pack("<Q", 2**63)]) + bytes(64), "ends inside its header"),
    "a string longer than the file": (container([value("k", STRING, struct.pack("<Q", 10**6))]), "ends inside"),
    "an array of 2^60 numbers": (container([value("k", ARRAY, struct.pack("<IQ", FLOAT32, 2**60))]), "values of k"),
    "an array of 2^60 strings": (container([value("k", ARRAY, struct.pack("<IQ", STRING, 2**60))]), "values of k"),
    "an array of 2^60 arrays": (container([value("k", ARRAY, struct.pack("<IQ", ARRAY, 2**60))]), "values of k"),
    "a string array that runs out": (
        container([value("k", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + struct.pack("<Q", 2**40))]),
        "ends inside its header",
    ),
    "arrays in arrays in arrays …": (
        container([value("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 50)]),
        "nested more than 4 deep",
    ),
    "an unknown value type": (container([value("k", 13, bytes(8))]), "metadata k has the unknown value type 13"),
    "an unknown element type": (container([value("k", ARRAY, struct.pack("<IQ", 77, 1) + bytes(8))]), "value type 77"),
    "a key given twice": (container([value("k", UINT8, b"\0")] * 2), "metadata k is given twice"),
    "a key that is not UTF-8": (container([value(b"\xff\xfe", UINT8, b"\0")]), "a metadata key is not valid UTF-8"),
    "a value that is not UTF-8": (container([value("k", STRING, text(b"\xc3"))]), "k is not valid UTF-8"),
    "alignment zero": (container([value("general.alignment", UINT32, bytes(4))]), "power of two, found 0"),
    "alignment three": (container([value("general.alignment", UINT32, b"\3\0\0\0")]), "power of two, found 3"),
    "alignment of text": (container([value("general.alignment", STRING, text("32"))]), "power of two, found '32'"),
    "no dimensions": (container((), [tensor("a", ())]), "tensor a has 0 dimensions"),
    "five dimensions": (container((), [tensor("a", (1,) * 5)]), "tensor a has 5 dimensions"),
    "2^32-1 dimensions": (
        container((), [text("a") + struct.pack("<I", 2**32 - 1) + bytes(40)]),
        f"tensor a has {2**32 - 1} dimensions",
    ),
    "a dimension of zero": (container((), [tensor("a", (32, 0))]), "every dimension must be positive"),
    "dimensions whose product overflows": (container((), [tensor("a", (2**33, 2**33))], F32_BLOCK), "needs bytes"),
    "dimensions whose product wraps to 32": (
        container((), [tensor("a", (2**63 + 4, 2))], F32_BLOCK),
        "needs bytes",
    ),
    "rows that are not whole blocks": (
        container((), [tensor("a", (33, 2), QUANT_TYPES["Q4_0"].gguf_id)], F32_BLOCK * 4),
        "tensor a has rows of 33 numbers, but Q4_0 packs 32 at a time",
    ),
    "a type that is not decoded": (container((), [tensor("a", (32,), 9)], bytes(36)), "has the type Q8_1, which"),
    "a type that nobody knows": (container((), [tensor("a", (256,), 999)], bytes(66)), "has the type number 999"),
    "a removed type": (container((), [tensor("a", (256,), 4)], bytes(256)), "has the type number 4"),
    "a tensor past the end": (container((), [tensor("a", (9,))], F32_BLOCK), "tensor a needs bytes .* truncated"),
    "an offset past the end": (container((), [tensor("a", (8,), offset=2**40)], F32_BLOCK), "tensor a needs bytes"),
    "an offset that overflows": (container((), [tensor("a", (8,), offset=2**64 - 32)], F32_BLOCK), "needs bytes"),
    "an offset off the grid": (container((), [tensor("a", (4,), offset=8)], F32_BLOCK), "multiple of the alignment 32"),
    "a name given twice": (container((), [tensor("a", (8,)), tensor("a", (8,))], F32_BLOCK), "described twice"),
    "tensors that overlap": (
        container((), [tensor("a", (8,), offset=32), tensor("b", (9,), offset=0)], bytes(64)),
        "tensors b and a overlap",
    ),
    "tensors in one place": (container((), [tensor("a", (8,)), tensor("b", (8,))], F32_BLOCK), "a and b overlap"),
    "a part number that is text": (container([value("split.count", STRING, text("2"))]), "split.count must be a whole"),
    "no data at all": (container((), [tensor("a", (8,))]), "tensor a needs bytes"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_give_one_sentence(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        read_bytes(tmp_path, content)
    assert str(tmp_path / "file.gguf") in str(caught.value)


def test_the_header_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(CheckpointError, match="header does not end within 1000 bytes"):
        read_bytes(tmp_path, container([value("k", STRING, text("a" * 900)), value("l", STRING, text("b" * 900))]))


def test_a_folder_or_missing_file_is_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.gguf"):
        with pytest.raises(CheckpointError, match="cannot read"):
            read_gguf(path)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "m.gguf"
    written_by_peer(path)
    return path.read_bytes()


def test_every_truncation_of_the_header_is_noticed(tmp_path: Path, valid: bytes) -> None:
    for length in range(0, len(valid) - 1000, 7):
        with pytest.raises(CheckpointError):
            read_bytes(tmp_path, valid[:length])


@given(edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6), cut=st.floats(0, 0.3))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_refused_or_read(
    tmp_path: Path, valid: bytes, edits: list[tuple[float, int]], cut: float
) -> None:
    damaged = bytearray(valid)
    for place, byte in edits:
        damaged[int(place * (len(damaged) - 1))] = byte
    try:
        file = read_bytes(tmp_path, bytes(damaged[: len(damaged) - int(cut * len(damaged))]))
    except CheckpointError:
        return
    for weight in file.tensors.values():
        assert weight.dequantize().shape == weight.shape
