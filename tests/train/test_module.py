"""The module under training: its methods against PEFT, and what it saves against what serves it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import VARIANTS, random_adapter, random_weights, tiny_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from puna.checkpoint import open_checkpoint, save_checkpoint  # noqa: E402
from puna.checkpoint.lora import read_adapter  # noqa: E402
from puna.checkpoint.lora_writer import merge, write_gguf_adapter, write_peft  # noqa: E402
from puna.errors import PunaError, TrainingError  # noqa: E402
from puna.model.model import Model  # noqa: E402
from puna.ops.protocol import Batch  # noqa: E402
from puna.ops.reference import ReferenceOps  # noqa: E402
from puna.ops.registry import make_ops  # noqa: E402
from puna.ops.torch_ops import TorchOps, document_batch  # noqa: E402
from puna.tensor import Adapter, LowRank  # noqa: E402
from puna.train.module import Full, LlamaModule, LoRA  # noqa: E402

CONFIG = VARIANTS["gqa"]
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 40)
BATCH = document_batch(TOKENS, np.array([0, 40]))


def module(method: Full | LoRA, weight_type: str = "F32", **options: Any) -> LlamaModule:
    weights = random_weights(CONFIG, seed=1, weight_type=weight_type)
    return LlamaModule(TorchOps(options.pop("dtype", torch.float32)), CONFIG, weights, method, **options)


def trained(lora: LoRA, weight_type: str = "F32") -> LlamaModule:
    """With changes of B as large as a long training makes."""
    built = module(lora, weight_type).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)
            elif "magnitude" in name:
                parameter.mul_(1.5)
    return built


def peft_model(lora: LoRA, state: dict[str, torch.Tensor]) -> Any:
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG.to_hf())).float()
    weights = random_weights(CONFIG, seed=1)
    base.load_state_dict({name: torch.from_numpy(w.dequantize().copy()) for name, w in weights.items()})
    options = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        use_rslora=lora.rank_stabilised,
        use_dora=lora.dora,
    )
    model = peft.get_peft_model(base, options).eval()
    given = {f"base_model.model.{name}": tensor for name, tensor in state.items() if ".lora_" in name}
    result = peft.set_peft_model_state_dict(model, given)
    assert not result.unexpected_keys
    return model


@pytest.mark.parametrize(
    "lora",
    [
        LoRA(rank=4, alpha=12),
        LoRA(rank=4, alpha=3, rank_stabilised=True, targets=("q_proj", "down_proj")),
        LoRA(rank=4, alpha=8, dora=True),
    ],
    ids=["plain", "rank-stabilised", "dora"],
)
def test_loss_and_gradients_are_those_of_peft(lora: LoRA) -> None:
    ours = trained(lora)
    peer = peft_model(lora, ours.state_dict())
    targets = torch.from_numpy(np.roll(TOKENS, -1))
    expected = torch.nn.functional.cross_entropy(peer(torch.from_numpy(TOKENS[None])).logits[0], targets)
    found = torch.nn.functional.cross_entropy(ours(BATCH), targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    found.backward()
    grads = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in peer.named_parameters()
        if parameter.requires_grad
    }
    own = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert {name.removesuffix(".weight") for name in own} == {name.removesuffix(".weight") for name in grads}
    for name, grad in own.items():
        peer_grad = grads[name] if name in grads else grads[f"{name}.weight"]
        assert (grad - peer_grad).abs().max() <= 1e-4 * peer_grad.abs().max(), name


def test_nothing_changes_before_training() -> None:
    expected = module(Full())(BATCH)
    for lora in (LoRA(), LoRA(dora=True)):
        torch.testing.assert_close(module(lora)(BATCH), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
def test_a_quantized_base_stays_quantized_and_is_saved_as_it_was(kind: str) -> None:
    built = trained(LoRA(rank=4), kind)
    before = random_weights(CONFIG, seed=1, weight_type=kind)
    for name, weight in before.items():
        if len(weight.shape) == 2:
            assert built.get_parameter(name).dtype == torch.uint8
    plain = Model.bind(ReferenceOps(), CONFIG, merge(tiny_checkpoint(CONFIG, 1, kind), built.adapter()).tensors)
    expected = reference_logits(plain)
    np.testing.assert_allclose(built(BATCH).detach().numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    after = built.merged()
    assert list(after) == list(before)
    assert after["model.embed_tokens.weight"].type.name == kind
    assert after["model.layers.0.mlp.up_proj.weight"].type.name == "F32"


def reference_logits(model: Model, adapters: np.ndarray | None = None) -> np.ndarray:
    rows = np.arange(40, dtype=np.int32)
    batch = Batch(
        tokens=TOKENS.astype(np.int32),
        positions=rows,
        seq_starts=np.array([0, 40], np.int32),
        slots=rows,
        block_tables=np.arange(3, dtype=np.int32)[None],
        context_lens=np.array([40], np.int32),
        logit_rows=rows,
        adapters=adapters,
    )
    return model.ops.to_host(model.forward(batch, model.ops.new_kv(CONFIG, 3, 16, "f32")))


@pytest.mark.parametrize("ops", ["reference", "native"])
@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_what_was_trained_is_what_is_served(tmp_path: Path, form: str, ops: str) -> None:
    if ops == "native":
        pytest.importorskip("puna._native")
    built = trained(LoRA(rank=4, alpha=12))
    path = tmp_path / ("adapter" if form == "peft" else "adapter.gguf")
    (write_peft if form == "peft" else write_gguf_adapter)(path, built.adapter(), CONFIG)
    read = read_adapter(path, CONFIG)
    assert read.digest == built.adapter().digest
    base = Model.bind(make_ops(ops), CONFIG, random_weights(CONFIG, seed=1))
    served = reference_logits(base.adapted([base.upload(read)]), np.zeros(1, np.int32))
    expected = built(BATCH).detach().numpy()
    assert np.abs(expected - reference_logits(base)).max() > 0.5
    assert np.abs(served - expected).max() <= 1e-3 * np.abs(expected).max()
    again = module(LoRA(rank=4, alpha=5)).eval()
    again.load_adapter(read)
    torch.testing.assert_close(again(BATCH), built(BATCH), rtol=1e-4, atol=1e-4)


def mixed_adapter() -> Adapter:
    """Ranks and scales that differ, of some layers only."""
    changes = dict(random_adapter(CONFIG, 3, targets=("q_proj", "up_proj")).changes)
    name = "model.layers.0.self_attn.k_proj.weight"
    changes[name] = LowRank(np.ones((5, 64), np.float32), np.ones((32, 5), np.float32) / 8, 0.25)
    del changes["model.layers.1.self_attn.q_proj.weight"]
    return Adapter(changes)


def test_ranks_and_scales_that_differ(tmp_path: Path) -> None:
    adapter = mixed_adapter()
    write_peft(tmp_path / "peft", adapter, CONFIG)
    write_gguf_adapter(tmp_path / "adapter.gguf", adapter, CONFIG)
    for path in (tmp_path / "peft", tmp_path / "adapter.gguf"):
        read = read_adapter(path, CONFIG)
        assert set(read.changes) == set(adapter.changes)
        for name, change in adapter.changes.items():
            found = read.changes[name]
            np.testing.assert_allclose(
                found.scale * found.b @ found.a, change.scale * change.b @ change.a, rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("dora", [False, True])
def test_peft_loads_what_we_write(tmp_path: Path, dora: bool) -> None:
    built = trained(LoRA(rank=4, alpha=12, dora=dora))
    adapter = Adapter({name: built.low_rank(name) for name in built.adapted})
    write_peft(tmp_path / "adapter", adapter, CONFIG, base_model="tiny", magnitudes=built.magnitudes())
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG.to_hf())).float()
    weights = random_weights(CONFIG, seed=1)
    base.load_state_dict({name: torch.from_numpy(w.dequantize().copy()) for name, w in weights.items()})
    peer = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = peer(torch.from_numpy(TOKENS[None])).logits[0]
        torch.testing.assert_close(built(BATCH), expected, rtol=1e-4, atol=1e-4)


def test_peft_loads_ranks_and_scales_that_differ(tmp_path: Path) -> None:
    write_peft(tmp_path / "adapter", mixed_adapter(), CONFIG)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG.to_hf())).float()
    weights = random_weights(CONFIG, seed=1)
    base.load_state_dict({name: torch.from_numpy(w.dequantize().copy()) for name, w in weights.items()})
    peer = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ours = Model.bind(ReferenceOps(), CONFIG, merge(tiny_checkpoint(CONFIG, 1), mixed_adapter()).tensors)
    with torch.no_grad():
        expected = peer(torch.from_numpy(TOKENS[None])).logits[0].numpy()
    np.testing.assert_allclose(reference_logits(ours), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("form", "kind"), [("safetensors", None), ("gguf", "Q8_0"), ("gguf", None)])
@pytest.mark.parametrize("dora", [False, True])
def test_merged_models_are_saved(tmp_path: Path, form: str, kind: str | None, dora: bool) -> None:
    built = trained(LoRA(rank=4, alpha=12, dora=dora))
    checkpoint = tiny_checkpoint(CONFIG, 1)
    checkpoint.tensors = built.merged()
    path = tmp_path / ("m.gguf" if form == "gguf" else "m")
    save_checkpoint(checkpoint, path, form, kind)
    served = reference_logits(Model.bind(ReferenceOps(), CONFIG, open_checkpoint(path).tensors))
    expected = built(BATCH).detach().numpy()
    assert np.abs(served - expected).max() <= (0.1 if kind else 1e-4) * np.abs(expected).max()


def test_freezing_by_name() -> None:
    built = module(Full(frozen=r"embed_tokens|layers\.0\."))
    built(BATCH).square().sum().backward()
    for name, parameter in built.named_parameters():
        frozen = "embed_tokens" in name or "layers.0." in name
        assert (parameter.grad is None) == frozen, name
    with pytest.raises(TrainingError, match="every weight is frozen"):
        module(Full(frozen="."))


@pytest.mark.parametrize("method", [Full(), LoRA(dropout=0.3)], ids=["full", "lora with dropout"])
def test_computing_layers_again_changes_nothing(method: Full | LoRA) -> None:
    gradients = []
    for recompute in (False, True):
        built = module(method, recompute=recompute)
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
        torch.manual_seed(5)
        built(BATCH).square().mean().backward()
        gradients.append({n: p.grad for n, p in built.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_dropout_is_for_training_only() -> None:
    built = trained(LoRA(rank=4, dropout=0.5))
    assert torch.equal(built(BATCH), built(BATCH))
    built.train()
    assert not torch.equal(built(BATCH), built(BATCH))


def test_bfloat16_computes_with_float32_masters() -> None:
    built = module(Full(), dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in built.parameters())
    logits = built(BATCH)
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    expected = module(Full())(BATCH)
    assert (logits.float() - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"targets": ("qproj",)}, "'qproj'"),
        ({"targets": ()}, "found none"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        LoRA(**options)


def test_what_cannot_be_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no adapter"):
        module(Full()).adapter()
    with pytest.raises(TrainingError, match="merge"):
        module(LoRA(dora=True)).adapter()
    built = module(LoRA(rank=4))
    with pytest.raises(TrainingError, match="rank 3, but the recipe has 4"):
        built.load_adapter(random_adapter(CONFIG, 3))
    with pytest.raises(TrainingError, match="other matrices"):
        built.load_adapter(random_adapter(CONFIG, 4, targets=("q_proj",)))
    write_peft(tmp_path / "taken", random_adapter(CONFIG, 2), CONFIG)
    with pytest.raises(PunaError, match="exists already"):
        write_peft(tmp_path / "taken", random_adapter(CONFIG, 2), CONFIG)
