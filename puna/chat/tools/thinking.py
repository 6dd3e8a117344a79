"""Reasoning told apart from the answer: DeepSeek-R1 and its kin write it between ``<think>`` and ``</think>``."""

from __future__ import annotations

from dataclasses import dataclass

from puna.chat.tools.deltas import TextDelta

_OPEN = "<think>"
_CLOSE = "</think>"


@dataclass(frozen=True)
class ThinkingDelta:
    """A piece of the reasoning that goes before an answer."""

    text: str


class ThinkingStream:
    """Splits an answer into its reasoning and its content, as the text arrives.

    ``opened`` says that the prompt ends with the opening tag already, so that the answer begins within the reasoning.
    Otherwise only an answer that begins with the tag, blanks aside, has reasoning. The tags and the blanks around the
    reasoning are left out; all other text is handed out unchanged. Without a closing tag, all is reasoning.
    """

    def __init__(self, opened: bool = False) -> None:
        self._state = "thinking" if opened else "start"
        self._held = ""
        self._begun = False

    def push(self, text: str) -> list[ThinkingDelta | TextDelta]:
        """What became certain with this text."""
        return self._step(text, False)

    def finish(self) -> list[ThinkingDelta | TextDelta]:
        """The rest."""
        return self._step("", True)

    def _step(self, text: str, ended: bool) -> list[ThinkingDelta | TextDelta]:
        self._held += text
        thinking = ""
        if self._state == "start":
            self._find_opening(ended)
        if self._state == "thinking":
            thinking = self._take_thinking(ended)
        if self._state == "gap":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "content"
        deltas: list[ThinkingDelta | TextDelta] = [ThinkingDelta(thinking)] if thinking else []
        if self._state == "content" and self._held:
            deltas.append(TextDelta(self._held))
            self._held = ""
        return deltas

    def _find_opening(self, ended: bool) -> None:
        begin = self._held.lstrip()
        if begin.startswith(_OPEN):
            self._state, self._held = "thinking", begin.removeprefix(_OPEN)
        elif ended or not _OPEN.startswith(begin):
            self._state = "content"

    def _take_thinking(self, ended: bool) -> str:
        """Reasoning that is certain. Blanks at its end are held: they may stand before the closing tag."""
        inside, closing, after = self._held.partition(_CLOSE)
        if closing:
            self._state, self._held = "gap", after
            inside = inside.rstrip()
        elif ended:
            inside, self._held = inside.rstrip(), ""
        else:
            sizes = range(len(_CLOSE) - 1, 0, -1)
            partial = next((size for size in sizes if inside.endswith(_CLOSE[:size])), 0)
            certain = inside[: len(inside) - partial].rstrip()
            self._held = inside[len(certain) :]
            inside = certain
        if not self._begun:
            inside = inside.lstrip()
            self._begun = bool(inside)
        return inside
