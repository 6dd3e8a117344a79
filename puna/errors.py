"""Errors a user can cause. Each message names the file or field, what was expected, what was found, and the remedy."""


class PunaError(Exception):
    """Base of every error that is shown to the user as one sentence, without a traceback."""


class ConfigError(PunaError):
    """A model's configuration is missing a value, or holds one that Puna does not support."""


class CheckpointError(PunaError):
    """A weights file is truncated, malformed, or not of the format it claims to be."""


class TokenizerError(PunaError):
    """A tokenizer file is malformed, or of a kind that Puna does not know."""


class TemplateError(PunaError):
    """A chat template does not compile, or rejects the messages it was given."""


class RequestError(PunaError):
    """A generation request asks for something impossible: a bad parameter, an overlong prompt, a bad schema."""


class ContextError(RequestError):
    """A prompt is longer than the context that must hold it."""


class NotFoundError(PunaError):
    """The server keeps nothing under the id that was given, or keeps it for somebody else."""


class StoreError(PunaError):
    """The local model store does not hold the model, or cannot be read or written."""


class SourceError(PunaError):
    """A model source cannot be reached, refuses access, or delivered the wrong bytes."""


class CapacityError(PunaError):
    """The machine cannot take more now: its memory or a queue is full. ``retry_after`` is a guess in seconds."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class AccessError(PunaError):
    """A key is missing, wrong, or not allowed to do this."""
