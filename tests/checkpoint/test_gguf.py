"""GGUF as a checkpoint format: real models, every variant of tiny ones, and what peers make of the files we write."""

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from puna.checkpoint.gguf import GGUFFormat
from puna.checkpoint.gguf_writer import write_gguf
from puna.checkpoint.names import gguf_name, hf_names, interleaved_order
from puna.config import RopeScaling, llama3_factors
from puna.errors import CheckpointError, ConfigError, PunaError
from puna.gguf_file import read_gguf
from puna.tensor import Weight
from tests.tiny_models import VARIANTS, tiny_checkpoint, tiny_config

gguf = pytest.importorskip("gguf")


def saved(checkpoint: Checkpoint, folder: Path, weight_type: str | None = None) -> Path:
    path = folder / "model.gguf"
    save_checkpoint(checkpoint, path, "gguf", weight_type)
    return path


def rewritten(path: Path, folder: Path, metadata: dict[str, Any] = {}, tensors: dict[str, Any] = {}) -> Path:  # noqa: B006
    """A copy of a GGUF file with some metadata and tensors changed, or left out where None is given."""
    file = read_gguf(path)
    values = {key: value for key, value in (file.metadata | metadata).items() if value is not None}
    weights = {key: weight for key, weight in (file.tensors | tensors).items() if weight is not None}
    target = folder / "changed.gguf"
    shapes = {name: weight.shape for name, weight in weights.items()}
    write_gguf(target, values, shapes, lambda name: (weights[name].type, [weights[name].data]))
    return target


def assert_same_weights(actual: Checkpoint, expected: Checkpoint) -> None:
    assert set(actual.tensors) == set(expected.tensors)
    for name, weight in expected.tensors.items():
        found = actual.tensors[name]
        assert (found.name, found.shape, found.type) == (name, weight.shape, weight.type)
        np.testing.assert_array_equal(found.data, weight.data, err_msg=name)


# What GGUF has no words for.
WRITABLE = [name for name in VARIANTS if name not in ("rope_dynamic", "rope_yarn_attention_factor")]


class TestRoundTrip:
    @pytest.mark.parametrize("variant", WRITABLE)
    def test_tiny_models_return_equal(self, tmp_path: Path, variant: str) -> None:
        original = tiny_checkpoint(VARIANTS[variant], seed=1)
        returned = open_checkpoint(saved(original, tmp_path))
        assert_same_weights(returned, original)
        assert returned.tokenizer is None
        if variant in ("rope_llama3", "rope_llama3_tied"):  # not a published scaling: only the divisors remain
            scaling = original.config.rope_scaling
            assert scaling is not None
            factors = np.float32(llama3_factors(scaling, original.config.rope_theta, original.config.head_dim))
            expected = RopeScaling("factors", factors=tuple(factors.tolist()))
            assert returned.config == replace(original.config, rope_scaling=expected)
        else:
            assert returned.config == original.config

    @pytest.mark.parametrize("type_name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
    def test_types_are_kept(self, tmp_path: Path, type_name: str) -> None:
        original = tiny_checkpoint(seed=2, weight_type=type_name)
        assert_same_weights(open_checkpoint(saved(original, tmp_path)), original)

    def test_k_quants_are_kept(self, tmp_path: Path) -> None:
        original = tiny_checkpoint(tiny_config(hidden_size=256, intermediate_size=512, head_dim=64))
        path = saved(original, tmp_path)
        rng = np.random.default_rng(0)
        weight = read_gguf(path).tensors["blk.0.attn_q.weight"]
        kind = gguf.GGMLQuantizationType.Q4_K
        blocks = rng.integers(0, 60, (weight.shape[0], gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        packed = Weight(
            weight.name, weight.shape, type(weight.type)("Q4_K", 256, 144, 12, "puna.tensor.kquants"), blocks
        )
        once = open_checkpoint(rewritten(path, tmp_path, tensors={weight.name: packed}))
        twice = open_checkpoint(saved(once, tmp_path))
        assert twice.tensors["model.layers.0.self_attn.q_proj.weight"].type.name == "Q4_K"
        assert_same_weights(twice, once)

    @pytest.mark.parametrize("name", ["rope_dynamic", "rope_yarn_attention_factor"])
    def test_what_gguf_cannot_say_is_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ConfigError, match="cannot be written to GGUF"):
            saved(tiny_checkpoint(VARIANTS[name]), tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_text_about_the_model_returns(self, tmp_path: Path) -> None:
        original = tiny_checkpoint()
        original.description |= {"name": "Tiny", "license": "apache-2.0", "languages": ["en", "fi"], "nested": {"a": 1}}
        original.chat_template = "{{ messages }}"
        returned = open_checkpoint(saved(original, tmp_path, "Q8_0"))
        expected = {"name": "Tiny", "license": "apache-2.0", "languages": ["en", "fi"], "file_type": "Q8_0"}
        assert returned.description == expected
        assert returned.chat_template == "{{ messages }}"

    @pytest.mark.parametrize("ends", [(), (2,), (2, 7), (2, 7, 9)])
    def test_ids_that_end_a_turn_return(self, tmp_path: Path, ends: tuple[int, ...]) -> None:
        config = tiny_config(eos_token_ids=ends, bos_token_id=None, pad_token_id=4)
        assert open_checkpoint(saved(tiny_checkpoint(config), tmp_path)).config == config


class TestReading:
    def test_rows_are_those_of_the_file_in_half_split_order(self, shared_data: Path) -> None:
        """The same model as Hugging Face's files (converted by transformers' and llama.cpp's own tools)."""
        load_file = pytest.importorskip("safetensors.numpy").load_file
        folder = shared_data / "weights" / "stories260K"
        checkpoint = open_checkpoint(folder / "stories260K.gguf")
        theirs = load_file(folder / "hf" / "model.safetensors")
        for name, weight in checkpoint.tensors.items():
            np.testing.assert_array_equal(weight.dequantize(), theirs[name].astype(np.float32), err_msg=name)
        assert set(checkpoint.tensors) == set(hf_names(checkpoint.config))

    def test_smollm2(self, smollm2_path: Path) -> None:
        checkpoint = open_checkpoint(smollm2_path)
        assert set(checkpoint.tensors) == set(hf_names(checkpoint.config))
        config = checkpoint.config
        assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
        assert (config.num_attention_heads, config.num_key_value_heads, config.rope_theta) == (9, 3, 100000.0)
        assert config.tie_word_embeddings
        assert "lm_head.weight" not in checkpoint.tensors
        assert checkpoint.description["license"] == "apache-2.0"
        assert checkpoint.description["file_type"] == "Q4_1"
        assert checkpoint.chat_template is not None
        raw = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_path).tensors}
        for stem, heads in (("q", 9), ("k", 3)):
            peer = raw[f"blk.7.attn_{stem}.weight"]
            rows = gguf.quants.dequantize(peer.data, peer.tensor_type)
            wanted = rows.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(heads * 64, 576)
            ours = checkpoint.tensors[f"model.layers.7.self_attn.{stem}_proj.weight"].dequantize()
            np.testing.assert_array_equal(ours, wanted)

    def test_only_rotary_tensors_are_copied(self, smollm2_path: Path) -> None:
        tensors = open_checkpoint(smollm2_path).tensors
        assert not tensors["model.embed_tokens.weight"].data.flags.owndata
        assert "model.norm.weight" in tensors
        assert "output_norm.weight" not in tensors
        with pytest.raises(KeyError):
            tensors["rope_freqs.weight"]

    def test_explicit_rope_factors(self, tmp_path: Path) -> None:
        factors = tuple(np.float32([1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.5]).tolist())
        config = tiny_config(rope_scaling=RopeScaling("factors", factors=factors))
        returned = open_checkpoint(saved(tiny_checkpoint(config), tmp_path))
        assert returned.config == config
        assert "rope_freqs.weight" not in returned.tensors

    def test_a_file_without_the_ending_is_recognised(self, tmp_path: Path) -> None:
        path = saved(tiny_checkpoint(), tmp_path).rename(tmp_path / "sha256-0123")
        assert open_checkpoint(path).config == tiny_config()
        assert not GGUFFormat().matches(tmp_path)

    def test_vocabulary_only(self, shared_data: Path) -> None:
        with pytest.raises(CheckpointError, match="holds no tensors"):
            open_checkpoint(shared_data / "tokenizers" / "ggml-vocab-llama-spm.gguf")

    def test_a_missing_tensor_is_named(self, tmp_path: Path) -> None:
        path = saved(tiny_checkpoint(), tmp_path)
        path = rewritten(path, tmp_path, tensors={"blk.1.ffn_up.weight": None})
        with pytest.raises(
            CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight of shape \(96, 64\) is missing"
        ):
            open_checkpoint(path)

    def test_a_wrong_shape_is_named(self, tmp_path: Path) -> None:
        wrong = Weight.from_array("blk.0.attn_k.weight", np.zeros((64, 32), np.float32))
        path = rewritten(saved(tiny_checkpoint(), tmp_path), tmp_path, tensors={wrong.name: wrong})
        with pytest.raises(CheckpointError, match=r"k_proj\.weight has shape \(64, 32\), .* calls for \(32, 64\)"):
            open_checkpoint(path)

    def test_an_unknown_tensor_is_named(self, tmp_path: Path) -> None:
        extra = Weight.from_array("blk.0.attn_q_norm.weight", np.zeros(16, np.float32))
        path = rewritten(saved(tiny_checkpoint(), tmp_path), tmp_path, tensors={extra.name: extra})
        with pytest.raises(CheckpointError, match=r"tensor blk\.0\.attn_q_norm\.weight has no place"):
            open_checkpoint(path)

    def test_rope_factors_of_the_wrong_shape(self, tmp_path: Path) -> None:
        path = saved(tiny_checkpoint(), tmp_path)
        matrix = Weight.from_array("rope_freqs.weight", np.ones((2, 4), np.float32))
        with pytest.raises(CheckpointError, match=r"rope_freqs\.weight has shape \(2, 4\)"):
            open_checkpoint(rewritten(path, tmp_path, tensors={matrix.name: matrix}))
        short = Weight.from_array("rope_freqs.weight", np.full(3, 2, np.float32))
        with pytest.raises(ConfigError, match="3 factors, expected"):
            open_checkpoint(rewritten(path, tmp_path, tensors={short.name: short}))

    def test_a_billion_layers_are_refused_at_once(self, tmp_path: Path) -> None:
        path = rewritten(saved(tiny_checkpoint(), tmp_path), tmp_path, {"llama.block_count": 2**31 - 1})
        with pytest.raises(CheckpointError, match="too few for a model of 2147483647 layers"):
            open_checkpoint(path)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("general.architecture", "mamba", "general.architecture 'mamba'"),
            ("general.architecture", None, "general.architecture None"),
            ("llama.embedding_length", "64", "llama.embedding_length must be a whole number"),
            ("llama.attention.head_count", [4, 4], "llama.attention.head_count must be a whole number"),
            ("llama.attention.head_count", 0, "num_attention_heads must be a positive"),
            ("llama.attention.head_count_kv", 3, "multiple of num_key_value_heads"),
            ("llama.attention.layer_norm_rms_epsilon", float("nan"), "epsilon.* nan|eps.* nan"),
            ("llama.rope.freq_base", -1.0, "(freq_base|rope_theta) .*-1"),
            ("llama.rope.scaling.type", 7, "llama.rope.scaling.type 7 is not supported"),
            ("llama.rope.scaling.type", ["linear"], "llama.rope.scaling.type .* is not supported"),
            ("llama.block_count", None, "lacks llama.block_count"),
            ("llama.expert_count", 8, "llama.expert_count"),
            ("tokenizer.ggml.bos_token_id", "one", "token id must be .* found 'one'"),
            ("tokenizer.ggml.eos_token_id", [2, 3], "token id must be"),
            ("tokenizer.ggml.eos_token_id", "two", "token id must be .* found 'two'"),
        ],
    )
    def test_impossible_metadata(self, tmp_path: Path, key: str, value: Any, message: str) -> None:
        path = rewritten(saved(tiny_checkpoint(), tmp_path), tmp_path, {key: value})
        with pytest.raises(PunaError, match=message):
            open_checkpoint(path)

    def test_a_vocabulary_of_the_wrong_kind(self, tmp_path: Path) -> None:
        changes = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": 5, "llama.vocab_size": None}
        with pytest.raises(PunaError, match=r"tokenizer\.ggml\.tokens must be an array, found 5"):
            open_checkpoint(rewritten(saved(tiny_checkpoint(), tmp_path), tmp_path, changes))


class TestWriting:
    def test_the_gguf_package_reads_it_equal(self, tmp_path: Path) -> None:
        original = tiny_checkpoint(VARIANTS["both_biases"], weight_type="Q5_1")
        reader = gguf.GGUFReader(saved(original, tmp_path))
        assert {name: field.contents() for name, field in reader.fields.items()}.items() >= {
            "GGUF.version": 3,
            "general.architecture": "llama",
            "general.file_type": gguf.LlamaFileType.MOSTLY_Q5_1,
            "general.quantization_version": gguf.GGML_QUANT_VERSION,
            "llama.attention.head_count_kv": 2,
            "llama.context_length": 128,
            "tokenizer.ggml.eos_token_id": 2,
        }.items()
        peers = {tensor.name: tensor for tensor in reader.tensors}
        assert set(peers) == {gguf_name(name) for name in original.tensors}
        for name, weight in original.tensors.items():
            peer = peers[gguf_name(name)]
            values = gguf.quants.dequantize(peer.data, peer.tensor_type).reshape(weight.shape)
            assert peer.data_offset % 32 == 0
            expected = weight.dequantize()
            for stem, heads in (("q_proj", 4), ("k_proj", 2)):
                if stem in name:
                    expected = expected[interleaved_order(heads, 16)]
            np.testing.assert_array_equal(values, expected, err_msg=name)

    @pytest.mark.parametrize("type_name", ["F16", "BF16", "Q8_0", "q4_0"])
    def test_matrices_are_encoded_anew_and_vectors_stay(self, tmp_path: Path, type_name: str) -> None:
        original = tiny_checkpoint(VARIANTS["attention_bias"])
        returned = open_checkpoint(saved(original, tmp_path, type_name))
        for name, weight in returned.tensors.items():
            wanted = Weight.from_array(
                name, original.tensors[name].dequantize(), type_name if weight.data.ndim > 1 else "F32"
            )
            assert weight.type == wanted.type
            np.testing.assert_array_equal(weight.data, wanted.data)

    def test_vectors_of_bfloat16_become_float32_and_matrices_stay(self, tmp_path: Path) -> None:
        original = tiny_checkpoint()
        original.tensors = {
            name: Weight.from_array(name, weight.dequantize(), "BF16") for name, weight in original.tensors.items()
        }
        returned = open_checkpoint(saved(original, tmp_path))
        for name, weight in returned.tensors.items():
            assert weight.type.name == ("BF16" if len(weight.shape) > 1 else "F32")
            np.testing.assert_array_equal(weight.dequantize(), original.tensors[name].dequantize())

    def test_rows_that_do_not_fit_become_f16_with_a_warning(self, tmp_path: Path) -> None:
        original = tiny_checkpoint(tiny_config(intermediate_size=100))
        with pytest.warns(UserWarning, match=r"2 of 21 .* F16, .* multiple of 32 as Q4_0 .*down_proj\.weight \(100\)"):
            path = saved(original, tmp_path, "Q4_0")
        types = {
            name: weight.type.name for name, weight in open_checkpoint(path).tensors.items() if weight.data.ndim > 1
        }
        assert {name for name, kind in types.items() if kind != "Q4_0"} == {
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.1.mlp.down_proj.weight",
        }
        assert set(types.values()) == {"Q4_0", "F16"}

    def test_a_type_without_encoder_is_refused_before_writing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="Q8_K can be read but not written"):
            saved(tiny_checkpoint(), tmp_path, "Q8_K")
        assert list(tmp_path.iterdir()) == []

    def test_an_incomplete_model_is_refused(self, tmp_path: Path) -> None:
        original = tiny_checkpoint()
        original.tensors = {name: w for name, w in original.tensors.items() if name != "model.norm.weight"}
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight .* is missing"):
            saved(original, tmp_path)

    def test_a_wrong_shape_is_refused_and_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = saved(tiny_checkpoint(), tmp_path)
        before = path.read_bytes()
        original = tiny_checkpoint()
        name = "model.layers.1.mlp.up_proj.weight"
        original.tensors = {**original.tensors, name: original.tensors[name].take_rows(slice(5))}
        with pytest.raises(CheckpointError, match=r"up_proj\.weight has shape \(5, 64\)"):
            saved(original, tmp_path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_a_file_can_be_rewritten_in_place(self, tmp_path: Path) -> None:
        original = tiny_checkpoint()
        path = saved(original, tmp_path)
        save_checkpoint(open_checkpoint(path), path, "gguf")
        assert_same_weights(open_checkpoint(path), original)

    def test_every_tensor_is_asked_for_once_and_let_go(self, tmp_path: Path) -> None:
        config = tiny_config(vocab_size=64, hidden_size=512, intermediate_size=2048, num_hidden_layers=8)
        shapes = hf_names(config)
        largest = 4 * 512 * 2048
        asked: list[str] = []

        class Made(dict[str, Weight]):
            def __getitem__(self, name: str) -> Weight:
                asked.append(name)
                return Weight.from_array(name, np.ones(shapes[name], np.float32))

        checkpoint = Checkpoint(config, Made.fromkeys(shapes))
        tracemalloc.start()
        try:
            path = saved(checkpoint, tmp_path, "F16")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert asked == list(shapes)
        assert path.stat().st_size > 12 * largest
        assert peak < 6 * largest


class TestTokenizer:
    def test_a_tokenizer_returns_with_its_ids(self, shared_data: Path, tmp_path: Path) -> None:
        original = open_checkpoint(shared_data / "weights" / "stories260K" / "stories260K.gguf")
        returned = open_checkpoint(saved(original, tmp_path))
        assert original.tokenizer is not None
        assert returned.tokenizer is not None
        text = "Once upon a time, there was a little girl named Lily. ünïcödé 🦙"
        assert returned.tokenizer.encode(text) == original.tokenizer.encode(text)
        assert returned.config == original.config

    def test_rows_without_a_token_get_a_placeholder(self, shared_data: Path, tmp_path: Path) -> None:
        tokenizer = open_checkpoint(shared_data / "weights" / "stories260K" / "stories260K.gguf").tokenizer
        checkpoint = tiny_checkpoint(tiny_config(vocab_size=515))
        checkpoint.read_tokenizer = lambda: tokenizer
        metadata = read_gguf(saved(checkpoint, tmp_path)).metadata
        assert metadata["tokenizer.ggml.tokens"][512:] == ["[PAD512]", "[PAD513]", "[PAD514]"]
        assert metadata["tokenizer.ggml.token_type"][512:] == [gguf.TokenType.UNUSED] * 3
        assert len(metadata["tokenizer.ggml.scores"]) == 515

    def test_tokens_without_a_row_are_refused(self, shared_data: Path, tmp_path: Path) -> None:
        tokenizer = open_checkpoint(shared_data / "weights" / "stories260K" / "stories260K.gguf").tokenizer
        checkpoint = tiny_checkpoint()
        checkpoint.read_tokenizer = lambda: tokenizer
        with pytest.raises(CheckpointError, match="512 tokens, but the embedding has only 256 rows"):
            saved(checkpoint, tmp_path)


class TestLlamaCpp:
    """llama.cpp itself computes the same from our file as from the original."""

    def logits(self, path: Path, prompt: bytes, count: int) -> tuple[np.ndarray, list[int]]:
        llama_cpp = pytest.importorskip("llama_cpp")
        model = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, seed=1, logits_all=True, verbose=False)
        ids = model.tokenize(prompt, special=True)
        model.eval(ids)
        logits = model.scores[: len(ids)].copy()
        model.reset()
        output = model.create_completion(prompt.decode(), max_tokens=count, temperature=0.0)
        return logits, [*ids, *model.tokenize(output["choices"][0]["text"].encode(), add_bos=False)]

    def assert_same(self, original: Path, ours: Path, prompt: bytes, count: int = 12) -> None:
        expected, actual = (self.logits(path, prompt, count) for path in (original, ours))
        assert actual[1] == expected[1]
        np.testing.assert_array_equal(actual[0], expected[0])

    def test_stories(self, shared_data: Path, tmp_path: Path) -> None:
        original = shared_data / "weights" / "stories260K" / "stories260K.gguf"
        self.assert_same(original, saved(open_checkpoint(original), tmp_path), b"Once upon a time")

    def test_smollm2(self, smollm2_path: Path, tmp_path: Path) -> None:
        prompt = b"<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
        self.assert_same(smollm2_path, saved(open_checkpoint(smollm2_path), tmp_path), prompt)

    @pytest.mark.parametrize("variant", WRITABLE)
    def test_every_variant_means_what_transformers_means(self, shared_data: Path, tmp_path: Path, variant: str) -> None:
        """Logits of one random model: by transformers from our weights, and by llama.cpp from our file."""
        llama_cpp, torch = pytest.importorskip("llama_cpp"), pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        checkpoint = tiny_checkpoint(replace(VARIANTS[variant], vocab_size=512), seed=3)
        stories = open_checkpoint(shared_data / "weights" / "stories260K" / "stories260K.gguf")
        checkpoint.read_tokenizer = stories.read_tokenizer
        ids = np.random.default_rng(0).integers(3, 512, 40).tolist()

        peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**checkpoint.config.to_hf())).eval()
        state = {name: torch.from_numpy(weight.dequantize().copy()) for name, weight in checkpoint.tensors.items()}
        peer.load_state_dict(state, strict=not checkpoint.config.tie_word_embeddings)
        with torch.no_grad():
            expected = peer(torch.tensor([ids])).logits[0].numpy()

        whole = {"n_ctx": 64, "n_threads": 1, "logits_all": True, "type_k": 0, "type_v": 0, "verbose": False}
        model = llama_cpp.Llama(str(saved(checkpoint, tmp_path)), **whole)
        model.eval(ids)
        np.testing.assert_allclose(model.scores[: len(ids)], expected, atol=2e-4 * np.abs(expected).max())

    @pytest.mark.parametrize("type_name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
    def test_it_decodes_what_we_encode(self, shared_data: Path, tmp_path: Path, type_name: str) -> None:
        llama_cpp = pytest.importorskip("llama_cpp")
        stories = open_checkpoint(shared_data / "weights" / "stories260K" / "stories260K.gguf")
        encoded = tiny_checkpoint(tiny_config(vocab_size=512), weight_type=type_name)
        plain = {n: Weight.from_array(n, weight.dequantize()) for n, weight in encoded.tensors.items()}
        found = []
        for number, tensors in enumerate((encoded.tensors, plain)):
            checkpoint = Checkpoint(encoded.config, tensors, stories.read_tokenizer)
            path = saved(checkpoint, tmp_path / str(number))
            model = llama_cpp.Llama(str(path), n_ctx=32, n_threads=1, logits_all=True, verbose=False)
            model.eval([1, 5, 9, 30, 4])
            found.append(model.scores[:5].copy())
        # Its products round the activations to the weights' precision, so the two agree only roughly.
        assert np.abs(found[1] - found[0]).max() < 0.03 * np.abs(found[1]).max()


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    checkpoint = tiny_checkpoint(tiny_config(vocab_size=32, hidden_size=32, intermediate_size=32, head_dim=8))
    return saved(checkpoint, tmp_path_factory.mktemp("valid"), "Q8_0").read_bytes()


@given(edits=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=4), data=st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_models_are_refused_or_read(
    tmp_path: Path, valid: bytes, edits: list[tuple[int, int]], data: st.DataObject
) -> None:
    damaged = bytearray(valid)
    for place, byte in edits:
        damaged[place] = byte
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged[: data.draw(st.sampled_from([len(damaged), len(damaged) - 1, 2000, 100]))])
    try:
        checkpoint = open_checkpoint(path)
        _ = checkpoint.tokenizer
    except PunaError:
        return
    for weight in checkpoint.tensors.values():
        assert weight.dequantize().shape == weight.shape
