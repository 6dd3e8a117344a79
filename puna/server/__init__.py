"""The HTTP server: translates the APIs of ollama, OpenAI and Anthropic into requests of the engine."""
