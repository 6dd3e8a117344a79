"""The Llama forward, and what a configuration says of a model."""
