"""Go's text/template, as far as ollama's chat templates use it: read, and run within bounds, in Python alone."""
