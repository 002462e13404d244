"""Training: recipes, the loop, checkpoints, evaluation and the pictures of a run."""
