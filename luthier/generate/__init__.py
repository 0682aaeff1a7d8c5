"""Text from a model: the engine that batches and streams, and the `generate` verb on top of it."""
