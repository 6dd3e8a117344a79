"""Answers sampled with the weights that a module has now, by the engine that serves models."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from puna.engine import Engine, Request, SamplingParams
from puna.model.model import Model
from puna.ops.registry import make_ops
from puna.tokenizer import Tokenizer
from puna.train.module import LlamaModule, LoRA

_BLOCK_SIZE, _ADAPTER = 32, "policy"


class Policy:
    """LoRA's change is loaded anew over one copy of the model; a model that is trained itself is bound anew.

    ``length``: of prompt and answer together; ``count``: how many answers are computed at once.
    """

    def __init__(self, module: LlamaModule, length: int, count: int) -> None:
        self._module, self._length, self._count = module, length, count
        self._ops = make_ops()
        self._adapts = isinstance(module.method, LoRA) and not module.method.dora
        self._engine: Engine | None = None

    def sample(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], eos_ids: Collection[int]
    ) -> list[list[int]]:
        """The ids of an answer to each prompt, with the one that ends it."""
        engine = self._current()
        adapter = _ADAPTER if self._adapts else None
        streams = [
            engine.submit(Request(prompt, each, eos_ids, adapter=adapter))
            for prompt, each in zip(prompts, params, strict=True)
        ]
        answers = []
        for stream in streams:
            ids = [event.token if event.token is not None else event.stop_id for event in stream]
            answers.append([token for token in ids if token is not None])
        return answers

    def greedy(self, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, max_tokens: int) -> list[str]:
        """The most probable answer to each prompt, token by token."""
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        eos_ids = end_ids(self._module, tokenizer)
        answers = self.sample(prompts, [params] * len(prompts), eos_ids)
        return [answer_text(tokenizer, answer, eos_ids) for answer in answers]

    def _current(self) -> Engine:
        module = self._module
        if not self._adapts:
            return self._bound(Model.bind(self._ops, module.config, module.merged()))
        if self._engine is None:
            self._engine = self._bound(Model.bind(self._ops, module.config, module.tensors))
        else:
            self._engine.unload_adapter(_ADAPTER)
        self._engine.load_adapter(_ADAPTER, module.adapter())
        return self._engine

    def _bound(self, model: Model) -> Engine:
        blocks = -(-self._length // _BLOCK_SIZE) * self._count
        return Engine(
            model,
            num_blocks=blocks,
            context_length=self._length,
            block_size=_BLOCK_SIZE,
            max_sequences=self._count,
            max_batch_tokens=max(512, self._count),
        )


def end_ids(module: LlamaModule, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end an answer."""
    return frozenset(module.config.eos_token_ids) | frozenset(tokenizer.eos_ids)


def answer_text(tokenizer: Tokenizer, ids: Sequence[int], eos_ids: Collection[int]) -> str:
    """An answer without the token that ended it."""
    return tokenizer.decode([token for token in ids if token not in eos_ids]).decode("utf-8", "replace")
