"""Regenerates tests/train/trl_objectives.json: losses and gradients of objectives by TRL's own trainers, in float32.

    python tests/golden/make_trl_objectives.py        # with TRL 1.16.0, datasets and accelerate installed

The models are random ones of tests/tiny_models.py, run by transformers: the policy of seed 2, its reference of seed 1.
Nothing of Puna's training is used. The trainers tokenize, batch and compute as they do in any run.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tiny_models import VARIANTS, random_weights  # noqa: E402

CONFIG = VARIANTS["gqa"]
FOLDER = tempfile.TemporaryDirectory()
# Token 2 ends an answer, as TRL requires; 0 is only padding.
PAIRS = [
    {"prompt": [5, 17, 200], "chosen": [33, 81, 9, 110, 2], "rejected": [120, 7, 2]},
    {"prompt": [90, 41, 66, 8], "chosen": [201, 13, 2], "rejected": [77, 150, 31, 240, 6, 2]},
]
# ORPO's cross entropy is over the prompt too in TRL, and a mean over all tokens: of prompts of one token and answers of
# one length that is the mean over pairs of the mean over the answer.
SHORT_PAIRS = [
    {"prompt": [5], "chosen": [33, 81, 9, 2], "rejected": [120, 7, 2]},
    {"prompt": [90], "chosen": [201, 13, 45, 2], "rejected": [77, 150, 31, 240, 2]},
]
LABELLED = [
    {"prompt": [5, 17, 200], "completion": [33, 81, 9, 110, 2], "label": True},
    {"prompt": [90, 41, 66, 8], "completion": [77, 150, 31, 2], "label": False},
    {"prompt": [11, 12], "completion": [201, 13, 2], "label": True},
]
GROUP = {
    "prompt": [5, 17, 200],
    "answers": [[33, 81, 9, 2], [120, 7, 2], [77, 150, 31, 240, 6, 2]],
    "rewards": [1.0, 0.0, 0.5],
}


def text(ids: list[int]) -> str:
    return " ".join(f"t{token:03}" for token in ids)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(
        models.WordLevel({f"t{number:03}": number for number in range(CONFIG.vocab_size)}, unk_token="t003")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="t002", pad_token="t000", unk_token="t003"
    )


def causal(seed: int) -> Any:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG.to_hf() | {"pad_token_id": 0})).float()
    weights = random_weights(CONFIG, seed=seed)
    model.load_state_dict({name: torch.from_numpy(w.dequantize().copy()) for name, w in weights.items()})
    return loaded(transformers.AutoModelForCausalLM, model)


def loaded(kind: Any, model: Any) -> Any:
    """Trainers ask where a model came from, and read its configuration there again."""
    folder = Path(tempfile.mkdtemp(dir=FOLDER.name))
    model.save_pretrained(folder)
    return kind.from_pretrained(folder, dtype=torch.float32)


def rows(examples: list[dict[str, Any]]) -> Dataset:
    spelt = []
    for row in examples:
        # WordLevel splits at blanks, so an answer begins with one.
        spelt.append(
            {
                key: (" " if key != "prompt" else "") + text(value) if isinstance(value, list) else value
                for key, value in row.items()
            }
        )
    return Dataset.from_list(spelt)


def options(kind: Any, folder: str, count: int, **more: Any) -> Any:
    return kind(
        output_dir=folder,
        per_device_train_batch_size=count,
        use_cpu=True,
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        **more,
    )


def result(trainer: Any, model: Any) -> dict[str, Any]:
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    return {"loss": loss.item(), "gradients": gradients(model)}


def gradients(model: Any) -> dict[str, Any]:
    """The length of each parameter's gradient, and the first numbers of it."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = {"norm": parameter.grad.norm().item(), "first": parameter.grad.flatten()[:4].tolist()}
    return found


def preference(kind: str, folder: str) -> dict[str, Any]:
    loss, more = {
        "dpo": ("sigmoid", {"beta": 0.1}),
        "ipo": ("ipo", {"beta": 0.1}),
        "orpo": (None, {"beta": 0.1}),
        "simpo": ("simpo", {"beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}),
    }[kind]
    model, data = causal(2), rows(SHORT_PAIRS if kind == "orpo" else PAIRS)
    if kind in ("dpo", "ipo"):
        args = options(trl.DPOConfig, folder, 2, loss_type=loss, disable_dropout=True, **more)
        trainer = trl.DPOTrainer(model, causal(1), args, train_dataset=data, processing_class=tokenizer())
    elif kind == "orpo":
        args = options(ORPOConfig, folder, 2, **more)
        trainer = ORPOTrainer(model, args, train_dataset=data, processing_class=tokenizer())
    else:
        args = options(CPOConfig, folder, 2, loss_type=loss, **more)
        trainer = CPOTrainer(model, args, train_dataset=data, processing_class=tokenizer())
    return result(trainer, trainer.model)


def kto(folder: str) -> dict[str, Any]:
    args = options(trl.KTOConfig, folder, 3, beta=0.1, desirable_weight=1.5, undesirable_weight=0.5)
    model = causal(2)
    data, words = rows(LABELLED), tokenizer()
    trainer = trl.KTOTrainer(model, causal(1), args, train_dataset=data, processing_class=words)
    found = result(trainer, trainer.model)
    return found | {"kl": trainer._metrics["train"]["kl"][-1]}


def reward(folder: str) -> dict[str, Any]:
    config = transformers.LlamaConfig(**CONFIG.to_hf() | {"pad_token_id": 0}, num_labels=1)
    model = transformers.LlamaForSequenceClassification(config).float()
    weights = random_weights(CONFIG, seed=2)
    state = {n: torch.from_numpy(w.dequantize().copy()) for n, w in weights.items() if n != "lm_head.weight"}
    state["score.weight"] = torch.linspace(-1, 1, CONFIG.hidden_size)[None]
    model.load_state_dict(state)
    model = loaded(transformers.AutoModelForSequenceClassification, model)
    args = options(trl.RewardConfig, folder, 2, disable_dropout=True)
    trainer = trl.RewardTrainer(model, args, train_dataset=rows(PAIRS), processing_class=tokenizer())
    return result(trainer, trainer.model)


def grpo(folder: str) -> dict[str, Any]:
    """The policy of seed 2, the answers sampled by one of seed 3, the reference of seed 1."""
    args = options(
        trl.GRPOConfig,
        folder,
        3,
        beta=0.04,
        epsilon=0.2,
        num_generations=3,
        loss_type="grpo",
        scale_rewards="group",
        use_bias_correction_kl=False,  # the formula of the paper
    )
    model, words = causal(2), tokenizer()
    data = Dataset.from_list([{"prompt": text(GROUP["prompt"])}] * 3)
    trainer = trl.GRPOTrainer(model, lambda **k: [0.0] * 3, args, train_dataset=data, processing_class=words)
    longest = max(map(len, GROUP["answers"]))
    completion = torch.tensor([a + [0] * (longest - len(a)) for a in GROUP["answers"]])
    mask = torch.tensor([[1] * len(a) + [0] * (longest - len(a)) for a in GROUP["answers"]])
    prompts = torch.tensor([GROUP["prompt"]] * 3)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completion,
        "completion_mask": mask,
    }
    with torch.no_grad():
        for key, seed in (("old_per_token_logps", 3), ("ref_per_token_logps", 1)):
            logits = causal(seed)(torch.cat([prompts, completion], 1)).logits[:, -longest - 1 : -1]
            inputs[key] = torch.log_softmax(logits, -1).gather(2, completion[..., None])[..., 0]
    rewards = torch.tensor(GROUP["rewards"])
    inputs["advantages"] = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    trainer.current_gradient_accumulation_steps = 1
    model.train()
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    return {"loss": loss.item(), "gradients": gradients(model), "kl": trainer._metrics["train"]["kl"][-1]}


def main() -> None:
    found: dict[str, Any] = {"made_with": f"TRL {trl.__version__}, transformers {transformers.__version__}"}
    found |= {"pairs": PAIRS, "short_pairs": SHORT_PAIRS, "labelled": LABELLED, "group": GROUP}
    for kind in ("dpo", "ipo", "orpo", "simpo"):
        found[kind] = preference(kind, FOLDER.name)
    found |= {"kto": kto(FOLDER.name), "reward": reward(FOLDER.name), "grpo": grpo(FOLDER.name)}
    path = ROOT / "train" / "trl_objectives.json"
    path.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
