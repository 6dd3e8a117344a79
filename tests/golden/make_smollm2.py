"""Regenerates smollm2_greedy.json: greedy continuations by transformers in float32, from the same GGUF file.

    python tests/golden/make_smollm2.py path/to/SmolLM2-135M-Instruct.Q4_1.gguf

transformers dequantizes the file and runs it with its own model, tokenizer and weight conversion: nothing of Puna's
is used. ``margin`` is the smallest lead of the chosen token over the runner-up in logits, so that a test can tell a
rounding difference from a bug.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time, in a small village by the sea,",
    "Die Hauptstadt von Deutschland ist",
]


def main() -> None:
    path = Path(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    cases = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tokens, margin = list(ids), float("inf")
        for _ in range(48):
            with torch.no_grad():
                top = model(torch.tensor([tokens])).logits[0, -1].topk(2)
            margin = min(margin, float(top.values[0] - top.values[1]))
            tokens.append(int(top.indices[0]))
            if tokens[-1] == 2:
                break
        cases.append({"prompt": prompt, "prompt_ids": ids, "ids": tokens[len(ids) :], "margin": round(margin, 4)})
        print(repr(tokenizer.decode(tokens[len(ids) :])), margin)
    Path(__file__).with_name("smollm2_greedy.json").write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
