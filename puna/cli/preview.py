"""Training examples on the terminal, with what is learnt underlined."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from puna.train.data.dataset import Dataset
    from puna.train.data.render import Renderer

_STRETCH = 600  # characters of one stretch of text


def example_preview(renderer: Renderer, dataset: Dataset, number: int) -> dict[str, Any]:
    """An example's documents, as stretches of text that are trained or not."""
    documents = []
    for document in renderer.documents(dataset[number]):
        stretches = []
        tokens = zip(document.ids.tolist(), document.trained.tolist(), strict=True)
        for trained, group in groupby(tokens, key=lambda token: token[1]):
            text = b"".join(renderer.tokenizer.token_bytes(token) for token, _ in group).decode("utf-8", "replace")
            stretches.append({"trained": trained, "text": text})
        documents.append(stretches)
    return {"row": dataset.where(number), "documents": documents}


def print_example(console: Console, example: dict[str, Any], learnt: str = "learnt") -> None:
    """Print what ``example_preview`` gives. ``learnt``: what the answers are for."""
    from rich.text import Text

    for document in example["documents"]:
        title = f"\n{printable(example['row'])}, with what is {learnt} underlined:"
        console.print(Text(title, "bold"), soft_wrap=True)
        shown = Text()
        for stretch in document:
            shown.append(_short(printable(stretch["text"])), "underline green" if stretch["trained"] else "dim")
        console.print(shown, soft_wrap=True)


def printable(text: str) -> str:
    """Data must not drive the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def _short(text: str) -> str:
    half = _STRETCH // 2
    return text if len(text) <= _STRETCH else f"{text[:half]} […] {text[-half:]}"
