"""Artifacts of Weights & Biases as folders of this machine, and folders of this machine as artifacts."""
