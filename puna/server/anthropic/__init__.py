"""Anthropic's API: /v1/messages and /v1/messages/count_tokens. See docs/anthropic-api.md."""

from puna.server.anthropic.routes import router

__all__ = ["router"]
