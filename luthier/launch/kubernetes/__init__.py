"""A run as a Kubernetes Job: `luthier launch kubernetes`."""
