"""Fine-tuning: from a user's rows to a model that Puna serves."""
