"""TorchOps against the reference ops' logits, and its gradients against transformers'."""

from collections.abc import Callable

import numpy as np
import pytest
from tiny_models import VARIANTS, random_adapter, random_weights, tiny_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from puna.config import ModelConfig  # noqa: E402
from puna.errors import RequestError  # noqa: E402
from puna.model.model import Model  # noqa: E402
from puna.ops import registry, torch_causal  # noqa: E402
from puna.ops.protocol import Batch  # noqa: E402
from puna.ops.reference import ReferenceOps  # noqa: E402
from puna.ops.torch_causal import CausalAttention  # noqa: E402
from puna.ops.torch_linear import multiply  # noqa: E402
from puna.ops.torch_ops import NoCache, TorchOps, document_batch  # noqa: E402
from puna.ops.torch_weights import LowRankMatrix  # noqa: E402
from puna.tensor import QUANT_TYPES, Weight  # noqa: E402

LENGTHS = [33, 96, 1, 40, 35]


def documents(config: ModelConfig, lengths: list[int] = LENGTHS) -> Batch:
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, sum(lengths))
    return document_batch(tokens, np.cumsum([0, *lengths]))


def reference_logits(config: ModelConfig, weights: dict[str, Weight], batch: Batch) -> np.ndarray:
    """Of each document alone."""
    ops = ReferenceOps()
    model = Model.bind(ops, config, weights)
    found = []
    for start, end in zip(batch.seq_starts, batch.seq_starts[1:], strict=False):
        rows = np.arange(end - start, dtype=np.int32)
        alone = Batch(
            tokens=batch.tokens[start:end],
            positions=rows,
            seq_starts=np.array([0, len(rows)], np.int32),
            slots=rows,
            block_tables=np.zeros((1, 1), np.int32),
            context_lens=np.array([len(rows)], np.int32),
            logit_rows=rows,
        )
        found.append(model.forward(alone, ops.new_kv(config, 1, len(rows))))
    return np.concatenate(found)


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_give_the_reference_logits(name: str) -> None:
    config = VARIANTS[name]
    weights, batch = random_weights(config, seed=1), documents(config)
    expected = reference_logits(config, weights, batch)
    found = Model.bind(TorchOps(), config, weights).forward(batch, NoCache(config.head_dim))
    assert np.abs(found.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    config = VARIANTS["gqa"]
    weights, batch = random_weights(config, seed=1), documents(config)
    expected = reference_logits(config, weights, batch)
    found = Model.bind(TorchOps(dtype), config, weights).forward(batch, NoCache(config.head_dim))
    assert found.dtype == dtype
    error = np.abs(found.double().numpy() - expected).max() / np.abs(expected).max()
    assert error <= (0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("kind", [*(name for name, k in QUANT_TYPES.items() if k.can_encode)])
def test_every_encoding_stays_as_it_is(kind: str) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1)
    weights, batch = random_weights(config, seed=1, weight_type=kind), documents(config, [7, 3])
    expected = reference_logits(config, weights, batch)
    for decode in (None, Weight.dequantize):
        model = Model.bind(TorchOps(decode=decode), config, weights)
        found = model.forward(batch, NoCache(config.head_dim))
        assert np.abs(found.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_native_decoder_gives_the_same_numbers() -> None:
    native = pytest.importorskip("puna.ops.native_ops").NativeOps(1)
    rng = np.random.default_rng(0)
    for name, kind in QUANT_TYPES.items():
        data = rng.integers(0, 60, (3, kind.row_bytes(512)), np.uint8)  # high bytes of scales: finite numbers
        weight = Weight("w", (3, 512), kind, data)
        np.testing.assert_array_equal(native.decode(weight), weight.dequantize(), err_msg=name)


@pytest.mark.parametrize("name", ["mha", "gqa", "tied", "both_biases", "rope_llama3", "rope_yarn"])
def test_gradients_are_those_of_transformers(name: str) -> None:
    config = VARIANTS[name]
    weights, batch = random_weights(config, seed=1), documents(config, [30, 30])
    targets = torch.from_numpy(np.random.default_rng(1).integers(0, config.vocab_size, 60))
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf())).float()
    peer.load_state_dict({n: torch.from_numpy(w.dequantize().copy()) for n, w in weights.items()}, strict=False)
    logits = peer(torch.from_numpy(batch.tokens.reshape(2, 30).astype(np.int64))).logits.reshape(60, -1)
    torch.nn.functional.cross_entropy(logits, targets).backward()

    tensors = {n: torch.from_numpy(w.dequantize().copy()).requires_grad_() for n, w in weights.items()}
    ours = Model(TorchOps(), config, tensors).forward(batch, NoCache(config.head_dim))
    torch.nn.functional.cross_entropy(ours, targets).backward()
    expected = {n: p.grad for n, p in peer.named_parameters()}
    assert set(tensors) == set(expected)
    for n, tensor in tensors.items():
        scale = expected[n].abs().max()
        assert scale > 0
        assert (tensor.grad - expected[n]).abs().max() <= 1e-4 * scale, n


def test_gradients_pass_through_encoded_matrices() -> None:
    """Towards the norms, which lie before them, as through the same numbers in float32."""
    config = VARIANTS["gqa"]
    encoded, batch = random_weights(config, seed=1, weight_type="Q8_0"), documents(config, [9, 20])
    plain = {n: Weight.from_array(n, w.dequantize()) for n, w in encoded.items()}
    gradients = []
    for weights in (encoded, plain):
        ops = TorchOps()
        tensors = {n: ops.weight(w) for n, w in weights.items()}
        norms = {n: t.clone().requires_grad_() for n, t in tensors.items() if n.endswith("norm.weight")}
        Model(ops, config, tensors | norms).forward(batch, NoCache(config.head_dim)).square().mean().backward()
        gradients.append({n: t.grad for n, t in norms.items()})
    for n, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][n], rtol=1e-5, atol=1e-7)


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="pip install 'puna"):
        registry.make_ops("torch")


def test_swiglu_gradient() -> None:
    gate, up = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(TorchOps(torch.float64).swiglu, (gate, up))


def wide(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)


def test_norm_and_rotation_gradients() -> None:
    ops = TorchOps(torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, 1e-3), (wide(3, 8), wide(8)))
    angles = ops.rope_angles(np.arange(3, dtype=np.int32), np.array([1.0, 0.3], np.float32), 1.1)
    assert torch.autograd.gradcheck(lambda x: ops.rope(x, angles), (wide(3, 8),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_need_not_lie_side_by_side(dtype: torch.dtype) -> None:
    """Neither those that come in nor the gradients that come back."""
    ops, weight = TorchOps(dtype), torch.rand(8)
    angles = ops.rope_angles(np.arange(6, dtype=np.int32), np.array([1.0, 0.3], np.float32), 1.0)
    for step in (
        lambda x: ops.rms_norm(x, weight, 1e-3),
        lambda x: ops.rope(x, angles),
        lambda x: ops.swiglu(x, 2 * x),
    ):
        found = []
        for x in (wide(8, 6).detach().to(dtype).T, wide(8, 6).detach().to(dtype).T.contiguous()):
            x.requires_grad_()
            out = step(x)
            out.T.backward(torch.arange(48, dtype=dtype).view(8, 6))
            found.append((out.detach(), x.grad))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("lengths", [[5, 5], [3, 17, 1, 18, 4]], ids=["equal", "mixed"])
def test_attention_gradients(lengths: list[int]) -> None:
    """Two heads of queries to one of keys and values; documents that need padding, and those that need none."""
    ops, batch, count = TorchOps(torch.float64), documents(VARIANTS["gqa"], lengths), sum(lengths)
    q, k, v = wide(count, 8, seed=1), wide(count, 4, seed=2), wide(count, 4, seed=3)
    owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = (owners[:, None] == owners).tril()
    scores = torch.einsum("thd,sd->hts", q.view(count, 2, 4), k) / 2
    expected = torch.einsum("hts,sd->thd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v).reshape(count, 8)
    found = ops.attend(q, k, v, NoCache(4), 0, batch)
    torch.testing.assert_close(found, expected)
    weights = wide(count, 8, seed=4).detach()
    gradients = [torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("numbers", [1 << 22, 1 << 17], ids=["together", "in parts"])
@pytest.mark.parametrize("length", [7, 128, 300])
def test_attention_as_products(length: int, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 what torch's own attention gives, gradients included; in bfloat16 that but for two roundings."""
    monkeypatch.setattr(torch_causal, "_NUMBERS", numbers)
    parts = [wide(2, length, heads, 8, seed=seed).detach() for seed, heads in enumerate((6, 2, 2, 6))]

    def results(attend: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v, weights = (part.to(torch.bfloat16).to(dtype) for part in parts)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = attend(*inputs)
        return [out, *torch.autograd.grad(out, inputs, weights)]

    def torchs(*inputs: torch.Tensor) -> torch.Tensor:
        by_head = (x.transpose(1, 2) for x in inputs)
        out = torch.nn.functional.scaled_dot_product_attention(*by_head, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    expected = results(torchs, torch.float64)
    torch.testing.assert_close(results(CausalAttention.apply, torch.float64), expected)
    for found, exact in zip(results(CausalAttention.apply, torch.bfloat16), expected, strict=True):
        assert (found - exact).norm() <= 2**-8 * exact.norm()


@pytest.mark.parametrize("residual", [False, True])
def test_products_of_one_input(residual: bool) -> None:
    """Trained, frozen and changed matrices at once: values and all gradients are those of the matrices written out."""
    x, added = wide(5, 4), wide(5, 6, seed=1) if residual else None
    plain, base = wide(6, 4, seed=2), wide(6, 4, seed=3).detach()
    a, b, c, d = wide(2, 4, seed=4), wide(6, 2, seed=5), wide(3, 4, seed=6), wide(6, 3, seed=7)
    weights = [LowRankMatrix(base, a, b, 0.5), plain, base, LowRankMatrix(base, c, d, 2.0)]
    found = multiply(x, weights, added)
    matrices = [base + 0.5 * b @ a, plain, base, base + 2 * d @ c]
    expected = [x @ w.T + (0 if added is None else added) for w in matrices]
    torch.testing.assert_close(found, expected)
    inputs = [t for t in (x, added, plain, a, b, c, d) if t is not None]
    gradients = [
        torch.autograd.grad(sum((n + 1) * out.square().sum() for n, out in enumerate(outs)), inputs)
        for outs in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_adapters_by_sequence_with_a_cache() -> None:
    config = VARIANTS["gqa"]
    weights, adapter = random_weights(config, seed=1), random_adapter(config, 3)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 24).astype(np.int32)
    batch = Batch(
        tokens=tokens,
        positions=np.tile(np.arange(12, dtype=np.int32), 2),
        seq_starts=np.array([0, 12, 24], np.int32),
        slots=np.concatenate([np.arange(12), 16 + np.arange(12)]).astype(np.int32),
        block_tables=np.array([[0], [1]], np.int32),
        context_lens=np.array([12, 12], np.int32),
        logit_rows=np.arange(24, dtype=np.int32),
        adapters=np.array([-1, 0], np.int32),
    )
    logits = []
    for ops in (ReferenceOps(), TorchOps()):
        base = Model.bind(ops, config, weights)
        adapted = base.adapted([base.upload(adapter)])
        logits.append(ops.to_host(adapted.forward(batch, ops.new_kv(config, 2, 16))))
    assert np.abs(logits[1] - logits[0]).max() <= 1e-5 * np.abs(logits[0]).max()
