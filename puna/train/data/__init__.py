"""Training data: files of rows, what rows mean, and how they become token ids with a loss mask. Numpy only."""
