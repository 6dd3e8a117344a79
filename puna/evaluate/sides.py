"""What two models must have in common to be compared, and what of their text handling differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from puna.chat.builtin import builtin_template
from puna.chat.go_template import chat_template
from puna.checkpoint import Checkpoint, open_checkpoint
from puna.errors import RequestError, TemplateError, TokenizerError
from puna.evaluate.samples import CONVERSATIONS, TEXTS
from puna.llm.identity import model_identity
from puna.model.shapes import parameter_count
from puna.store import ResolvedModel
from puna.tensor import Adapter
from puna.tokenizer import Tokenizer

_SHOWN, _SHOWN_IDS = 40, 4


@dataclass(frozen=True)
class Side:
    """One of two models: what it is called, where it lies, what is in its files, and what adapter it is used with."""

    name: str
    found: ResolvedModel
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    adapter: Adapter | None = None

    @classmethod
    def open(cls, name: str, found: ResolvedModel, adapter: Adapter | None = None) -> Side:
        """Raises CheckpointError, and TokenizerError for a model without a tokenizer."""
        checkpoint = open_checkpoint(found.path)
        if checkpoint.tokenizer is None:
            raise TokenizerError(f"{name} has no tokenizer to compare it with; put it beside the weights")
        return cls(name, found, checkpoint, checkpoint.tokenizer, adapter)

    @property
    def identity(self) -> str:
        """A text that differs where the weights or the adapter do."""
        own = model_identity(self.found)
        return own if self.adapter is None else sha256(f"{own} {self.adapter.digest}".encode()).hexdigest()

    @property
    def bytes(self) -> int:
        return stored_bytes(self.found.path, self.checkpoint)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / parameter_count(self.checkpoint.config)

    def prompts(self) -> Iterator[str]:
        """Each sample conversation as the model's template writes it, or why it doesn't."""
        try:
            manifest = self.found.manifest
            source = (manifest.template if manifest else None) or self.checkpoint.chat_template
            template = chat_template(source or builtin_template(self.tokenizer), self.tokenizer)
        except TemplateError as error:
            yield from (f"no prompt: {error}" for _ in CONVERSATIONS)
            return
        for messages, tools in CONVERSATIONS:
            try:
                yield template.render(messages, tools=tools)
            except TemplateError as error:
                yield f"no prompt: {error}"


def tensor_types(checkpoint: Checkpoint) -> dict[str, int]:
    """How many tensors are computed with in which encoding, the most frequent first."""
    return dict(Counter(weight.type.name for weight in checkpoint.tensors.values()).most_common())


def stored_bytes(path: Path, checkpoint: Checkpoint) -> int:
    """Bytes that the weights take on disk: of a GGUF file the tensors, of a folder the files that hold them.

    A quantized folder's tensors may take more in memory.
    """
    for suffix in (".safetensors", ".pth"):
        files = [path] if path.suffix == suffix else list(path.glob("*" + suffix))
        if files:
            return sum(file.stat().st_size for file in files)
    return sum(weight.nbytes for weight in checkpoint.tensors.values())


def check_comparable(a: Side, b: Side) -> None:
    """Raise RequestError, saying what differs, unless both predict the same tokens."""
    sizes = [side.checkpoint.config.vocab_size for side in (a, b)]
    pieces = [side.tokenizer.vocabulary.pieces for side in (a, b)]
    if sizes[0] != sizes[1] or len(pieces[0]) != len(pieces[1]):
        counts = [f"{size} ({len(held)} of them in its tokenizer)" for size, held in zip(sizes, pieces, strict=True)]
        raise RequestError(
            f"{a.name} and {b.name} predict different tokens and can't be compared: their vocabularies have "
            f"{counts[0]} and {counts[1]} tokens"
        )
    for token, (ours, theirs) in enumerate(zip(*pieces, strict=True)):
        if ours != theirs:
            raise RequestError(
                f"{a.name} and {b.name} predict different tokens and can't be compared: token {token} is "
                f"{ours[:_SHOWN]!r} in the one and {theirs[:_SHOWN]!r} in the other"
            )


def token_differences(a: Side, b: Side) -> list[str]:
    """Of the sample texts, those that become different ids, a sentence each."""
    different = []
    for text in TEXTS:
        ours, theirs = (_attempt(side.tokenizer, text) for side in (a, b))
        if ours != theirs:
            at = _common(ours, theirs)
            shown = [str(ids[at : at + _SHOWN_IDS])[1:-1] or "the end" for ids in (ours, theirs)]
            different.append(f"{text[:_SHOWN]!r} differs from token {at} on: {shown[0]} in the source, {shown[1]} here")
    for what in ("add_bos", "bos_id", "eos_id", "eos_ids", "special_ids"):
        if getattr(a.tokenizer, what) != getattr(b.tokenizer, what):
            different.append(f"{what} of the tokenizers differ")
    return different


def template_differences(a: Side, b: Side) -> list[str]:
    """Of the sample conversations, those that become different prompts, a sentence each."""
    different = []
    for number, (ours, theirs) in enumerate(zip(a.prompts(), b.prompts(), strict=True), start=1):
        if ours != theirs:
            at = _common(ours, theirs)
            shown = [repr(prompt[at : at + _SHOWN]) for prompt in (ours, theirs)]
            different.append(
                f"conversation {number} differs from character {at} on: {shown[0]} in the source, {shown[1]} here"
            )
    return different


def _attempt(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return tokenizer.encode(text, add_bos=tokenizer.add_bos, parse_special=True)
    except TokenizerError:
        return []


def _common(a: Sequence[object], b: Sequence[object]) -> int:
    """How long the two are the same."""
    shorter = min(len(a), len(b))
    return next((at for at in range(shorter) if a[at] != b[at]), shorter)
