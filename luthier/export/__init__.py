"""What a user takes away from a run: merged models and combined adapters."""
