"""The model as a person or a script uses it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from puna.chat.builtin import builtin_template
from puna.chat.messages import Message, parse_messages
from puna.engine import Constraint, Engine, LoadedAdapter, PrefixCache, Request, SamplingParams, Speculation
from puna.engine.runner import ForwardModel
from puna.errors import RequestError, TemplateError
from puna.llm import scoring
from puna.llm.answers import Chunk, Completion, collect, stream_chunks
from puna.llm.loading import load_parts
from puna.llm.memory import BLOCK_SIZE, DEFAULT_CONTEXT, cache_blocks
from puna.model.model import Model
from puna.ops.protocol import Ops
from puna.store import ResolvedModel, resolve
from puna.tokenizer import Tokenizer

if TYPE_CHECKING:  # what chat needs beyond text is imported when somebody chats: it takes as long as numpy
    from puna.chat.prompt import Prompt
    from puna.chat.template import Template
    from puna.chat.tools import ToolFormat
    from puna.engine.constraint import ConstraintCompiler

CACHE_SIZE = 10**9
MAX_SEQUENCES = 64
MAX_BATCH_TOKENS = 512


class LLM:
    """A loaded model: generate, chat, and look at what it computes.

    >>> from puna import LLM
    >>> with LLM.load("smollm2") as llm:
    ...     answer = llm.chat([{"role": "user", "content": "What is 2+2?"}], temperature=0)
    >>> answer.text
    'The answer to this classic math problem is 4.'

    Not thread-safe: one thread at a time.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        chat_template: str | None = None,
        system: str | None = None,
        history: Sequence[tuple[str, str]] = (),
        defaults: Mapping[str, Any] | None = None,
        context_length: int | None = None,
        kv_type: str | None = None,
        speculation: Speculation | None = None,
        prefix_cache: PrefixCache | None = None,
        max_sequences: int = MAX_SEQUENCES,
    ) -> None:
        """Prefer ``LLM.load``. ``system`` and ``defaults`` (sampling parameters) apply where a call gives none.

        ``history``: (role, text) of messages that every chat begins with.
        """
        self.model = model
        self.system = system
        self.history = [Message(role, text) for role, text in history]
        self.config = model.config
        self.tokenizer = tokenizer
        self.defaults = dict(defaults or {})
        self.own_adapter: str | None = None
        self.kv_type = kv_type
        self._chat_template = chat_template
        context = context_length
        if context is None:
            context = min(model.config.max_position_embeddings, DEFAULT_CONTEXT)
        draft = None if speculation is None else speculation.draft_model
        with_cache = [model] if draft is None else [model, draft]
        self.engine = Engine(
            model,
            num_blocks=cache_blocks(with_cache, context, kv_type, explicit=context_length is not None),
            context_length=context,
            block_size=BLOCK_SIZE,
            kv_type=kv_type,
            speculation=speculation,
            prefix_cache=prefix_cache,
            max_sequences=max_sequences,
            max_batch_tokens=max(MAX_BATCH_TOKENS, max_sequences),
        )
        self.context_length = self.engine.context_length

    @classmethod
    def load(
        cls,
        name_or_path: str | Path | ResolvedModel,
        *,
        context_length: int | None = None,
        threads: int | None = None,
        ops: str | Ops | None = None,
        kv_type: str | None = None,
        speculative: str | Speculation | None = None,
        draft_model: str | Path | None = None,
        packed: bool | str | Path = True,
        cache_dir: str | Path | None = None,
        cache_size: int = CACHE_SIZE,
        max_sequences: int = MAX_SEQUENCES,
        adapters: bool = True,
    ) -> LLM:
        """Load a stored model (``name[:tag]``), a .gguf file, or a checkpoint folder.

        A stored model's own settings hold where nothing else is asked for (docs/modelfile.md). ``context_length``
        (tokens of prompt and answer) defaults to the model's, at most 8192. ``threads`` defaults to the physical cores.
        ``ops``: ``native`` or ``reference``, or ops to share with other models. ``kv_type``: what
        keys and values are kept as, ``f16`` (the default of native ops), ``bf16``, ``q8_0`` (half the memory) or
        ``f32``. ``speculative``: ``ngram`` or ``off``; ``draft_model`` is a smaller model of the same vocabulary,
        loaded in the same way (docs/speculative.md). ``packed``: start from the models' packed files where there are
        some, or from the one that it names (docs/loading.md). ``cache_dir``: a private folder that keeps what was
        computed of prompts and answers for later processes, at most ``cache_size`` bytes of it (docs/prefix-cache.md).
        At most ``max_sequences`` requests are computed together. ``adapters``: load those that a stored model comes
        with; a single one is then part of the model, used wherever no other is named.

        Raises StoreError, CheckpointError, ConfigError, TokenizerError, RequestError.
        """
        found = name_or_path if isinstance(name_or_path, ResolvedModel) else resolve(name_or_path)
        parts = load_parts(
            found,
            context_length=context_length,
            threads=threads,
            ops=ops,
            speculative=speculative,
            draft_model=draft_model,
            packed=packed,
            cache_dir=cache_dir,
            cache_size=cache_size,
        )
        llm = cls(**vars(parts), kv_type=kv_type, max_sequences=max_sequences)
        own = found.adapters if adapters else {}
        for name, path in own.items():
            llm.load_adapter(name, path)
        llm.own_adapter = next(iter(own)) if len(own) == 1 else None
        return llm

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the weights and the cache; the object can't be used afterwards."""
        self.__dict__.clear()

    @cached_property
    def template(self) -> Template:
        """The chat template: the model's own, or the one its special tokens call for.

        Raises TemplateError for a broken one, and for a base model, which has none.
        """
        from puna.chat.go_template import chat_template

        source = self._chat_template or builtin_template(self.tokenizer)
        return chat_template(source, self.tokenizer)

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How the model is told of tools and writes calls. Raises TemplateError as ``template`` does."""
        from puna.chat.tools import tool_format

        return tool_format(self.template, self.tokenizer)

    @property
    def has_template(self) -> bool:
        """Whether the model can chat; a base model only continues text."""
        try:
            return bool(self._chat_template or builtin_template(self.tokenizer))
        except TemplateError:
            return False

    @cached_property
    def constraints(self) -> ConstraintCompiler:
        """Makes constraints (JSON schema, regular expression, grammar) for this model's vocabulary."""
        from puna.engine.constraint import ConstraintCompiler

        return ConstraintCompiler(self.tokenizer, self.config.vocab_size, self.eos_ids)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every token id that ends an answer."""
        return frozenset(self.config.eos_token_ids) | frozenset(self.tokenizer.eos_ids)

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Read a LoRA adapter, a folder that PEFT saved or a GGUF file, which calls may then name (docs/adapters.md).

        It changes nothing for calls that don't. Raises CheckpointError when it is no adapter of this model, and
        RequestError when the name is taken.
        """
        from puna.checkpoint.lora import read_adapter

        self.engine.load_adapter(name, read_adapter(path, self.config))

    def unload_adapter(self, name: str) -> None:
        """Free an adapter. Raises RequestError when there is none of that name, or while an answer uses it."""
        self.engine.unload_adapter(name)

    @property
    def adapters(self) -> Mapping[str, LoadedAdapter]:
        """The loaded adapters by name, with their ``rank`` and the memory they take, ``nbytes``."""
        return self.engine.adapters

    def sampling(self, params: SamplingParams | None = None, **overrides: Any) -> SamplingParams:
        """``params``, or the model's defaults with ``overrides``. Raises RequestError for a parameter that is none."""
        if params is not None:
            if not isinstance(params, SamplingParams):
                raise RequestError(f"params must be SamplingParams, found {type(params).__name__}")
            if overrides:
                raise RequestError("give either params or single sampling parameters, not both")
            return params
        try:
            return SamplingParams(**{**self.defaults, **overrides})
        except TypeError as error:
            raise RequestError(f"unknown sampling parameter: {str(error).split('argument ')[-1]}") from None

    @overload
    def generate(
        self, prompts: str, params: SamplingParams | None = ..., *, stream: Literal[False] = ..., **options: Any
    ) -> Completion: ...
    @overload
    def generate(
        self, prompts: list[str], params: SamplingParams | None = ..., *, stream: Literal[False] = ..., **options: Any
    ) -> list[Completion]: ...
    @overload
    def generate(
        self, prompts: str | list[str], params: SamplingParams | None = ..., *, stream: Literal[True], **options: Any
    ) -> Iterator[Chunk]: ...
    def generate(
        self,
        prompts: str | list[str],
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        constraint: Constraint | None = None,
        adapter: str | None = None,
        parse_special: bool = False,
        **sampling: Any,
    ) -> Completion | list[Completion] | Iterator[Chunk]:
        """Continue raw text, several texts at once in one batch, with no chat template.

        ``sampling`` are fields of SamplingParams (``temperature``, ``max_tokens``, ``seed``, ``stop``, …). With
        ``stream``, pieces come as they are ready. ``constraint`` comes from ``llm.constraints``. ``adapter`` names a
        loaded one. ``parse_special`` reads control tokens in the prompt's text as such. Raises RequestError.

        >>> llm.generate("The capital of France is", temperature=0, max_tokens=1).text
        ' Paris'
        >>> "".join(chunk.text for chunk in llm.generate("1, 2, 3,", temperature=0, max_tokens=2, stream=True))
        ' 4'
        """
        encoded = [self.encode(text, parse_special=parse_special) for text in _texts(prompts)]
        requests = [self._request(ids, self.sampling(params, **sampling), constraint, adapter) for ids in encoded]
        chunks = stream_chunks(self.engine, requests, self.tokenizer)
        if stream:
            return chunks
        completions = collect(chunks, requests)
        return completions[0] if isinstance(prompts, str) else completions

    @overload
    def chat(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        params: SamplingParams | None = ...,
        *,
        stream: Literal[False] = ...,
        **options: Any,
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        params: SamplingParams | None = ...,
        *,
        stream: Literal[True],
        **options: Any,
    ) -> Iterator[Chunk]: ...
    def chat(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        constraint: Constraint | None = None,
        adapter: str | None = None,
        **sampling: Any,
    ) -> Completion | Iterator[Chunk]:
        """Answer a conversation (``{"role", "content"}``) through the model's chat template.

        Control tokens in a message's text are plain text to the model. Options as for ``generate``. Raises
        RequestError, TemplateError.

        >>> llm.chat([{"role": "user", "content": "What is 2+2?"}], temperature=0, stop=["4"]).text
        'The answer to this classic math problem is '
        """
        prompt = self.prompt(messages, tools=tools)
        requests = [self._request(prompt.ids, self.sampling(params, **sampling), constraint, adapter)]
        chunks = stream_chunks(self.engine, requests, self.tokenizer)
        return chunks if stream else collect(chunks, requests)[0]

    def prompt(
        self, messages: Sequence[Message | Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Prompt:
        """The exact text and token ids that ``chat`` gives to the model, and where each came from."""
        from puna.chat.prompt import render_prompt

        return render_prompt(self.template, self.tokenizer, self.conversation(messages), tools=tools)

    def conversation(self, messages: Sequence[Message | Mapping[str, Any]]) -> list[Message]:
        """The messages, checked, behind what the model brings along: its system prompt, unless there is one, and its
        example messages. Raises RequestError.
        """
        parsed = parse_messages(messages)
        if self.system is not None and not any(message.role == "system" for message in parsed):
            parsed.insert(0, Message("system", self.system))
        head = 1 if parsed[0].role == "system" else 0
        return [*parsed[:head], *self.history, *parsed[head:]]

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """The ids of a raw prompt: after one BOS, if the model wants it.

        ``parse_special`` reads control tokens that the text spells as such.

        >>> llm.encode("Hello world")
        [19556, 905]
        """
        ids = self.tokenizer.encode(text, add_bos=self.tokenizer.add_bos, parse_special=parse_special)
        if ids[:2] == [self.tokenizer.bos_id] * 2:  # the text spells the one that would be put before it
            del ids[0]
        return ids

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """float32[T, V]: row t holds the scores of the token after ``ids[t]``.

        >>> llm.logits(llm.tokenizer.encode("Hello world")).shape
        (2, 49152)
        """
        return scoring.logits(self._scored, ids, self.kv_type)

    def embed(self, texts: str | Sequence[str]) -> NDArray[np.float32]:
        """float32[N, D]: the mean of the final hidden states of each text, scaled to length 1.

        >>> llm.embed(["a cat", "a dog"]).shape
        (2, 576)
        """
        encoded = [self.tokenizer.encode(text, add_bos=self.tokenizer.add_bos) for text in _texts(texts)]
        vectors = np.empty((len(encoded), self.config.hidden_size), np.float32)
        for row, ids in zip(vectors, encoded, strict=True):
            row[:] = scoring.embedding(self._scored, ids, self.kv_type)
        return vectors

    def score(self, prompt: str, continuation: str) -> scoring.Score:
        """How probable ``continuation`` is after ``prompt``.

        The prompt's tokens are those it has on its own; trailing white space of it is counted to the continuation,
        where tokenizers put it.

        >>> good, bad = (llm.score("The capital of France is", place).logprob for place in (" Paris", " Oslo"))
        >>> good > bad
        True
        """
        stripped = prompt.rstrip()
        continuation = prompt[len(stripped) :] + continuation
        prompt_ids = self.tokenizer.encode(stripped, add_bos=self.tokenizer.add_bos)
        whole = self.tokenizer.encode(stripped + continuation, add_bos=self.tokenizer.add_bos)
        return scoring.score(self._scored, prompt_ids, whole[len(prompt_ids) :], self.kv_type)

    @property
    def _scored(self) -> ForwardModel:
        """The model as it answers where no adapter is named."""
        if self.own_adapter is None:
            return self.model
        return scoring.AlwaysAdapted(self.engine.adapted_model, self.adapters[self.own_adapter].number)

    def _request(
        self, ids: Sequence[int], params: SamplingParams, constraint: Constraint | None, adapter: str | None
    ) -> Request:
        if constraint is not None and not hasattr(constraint, "start"):
            raise RequestError(f"constraint must come from llm.constraints, found {type(constraint).__name__}")
        return Request(ids, params, self.eos_ids, constraint, adapter=adapter or self.own_adapter)


def _texts(given: str | Sequence[str]) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"expected a text or a list of texts, found {repr(given)[:100]}")
    return list(texts)
