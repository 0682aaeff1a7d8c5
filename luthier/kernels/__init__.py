"""One file per operation: tensors in, tensors out, nothing of the rest of the package."""
