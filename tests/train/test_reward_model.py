"""Reward models as transformers loads them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import VARIANTS, tiny_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from puna.errors import TrainingError  # noqa: E402
from puna.ops.torch_ops import TorchOps  # noqa: E402
from puna.train.data.tokens import Tokens, concatenate  # noqa: E402
from puna.train.module import Full, LlamaModule, LoRA  # noqa: E402
from puna.train.objectives.reward import Reward, document_scores, save_reward_model  # noqa: E402

# Documents end with token 2, which is the padding too in many models; transformers would read past it then.
DOCUMENTS = [[5, 17, 33, 2], [90, 41, 66, 8, 201, 13, 2], [7, 2]]


@pytest.mark.parametrize("variant", ["gqa", "tied"])
@pytest.mark.parametrize("method", [Full(), LoRA(rank=4, alpha=8)], ids=["full", "lora"])
def test_transformers_gives_the_same_scores(tmp_path: Path, variant: str, method: Full | LoRA) -> None:
    checkpoint = tiny_checkpoint(replace(VARIANTS[variant], pad_token_id=2), seed=1)
    module = LlamaModule(TorchOps(), checkpoint.config, checkpoint.tensors, method)
    Reward().objective(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    save_reward_model(module, checkpoint, tmp_path / "model")
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (model.config.num_labels, model.config.pad_token_id) == (1, 1)
    longest = max(map(len, DOCUMENTS))
    padded = torch.tensor([ids + [1] * (longest - len(ids)) for ids in DOCUMENTS])
    with torch.no_grad():
        expected = model.float().eval()(padded, attention_mask=(padded != 1).long()).logits[:, 0]
    packed = concatenate([Tokens.of(ids, [(1, len(ids))]) for ids in DOCUMENTS])
    found = document_scores(module.eval(), packed).detach()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.std() > 0.01


def test_a_module_without_a_score_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    module = LlamaModule(TorchOps(), checkpoint.config, checkpoint.tensors, Full())
    with pytest.raises(TrainingError, match="no score"):
        save_reward_model(module, checkpoint, tmp_path / "model")
