"""All benchmarks of lm-evaluation-harness, with our engine as the model that it asks."""
