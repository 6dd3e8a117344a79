"""Conversations: messages, the templates that turn them into prompts, and text streaming back."""
