"""Training: from a config to a finished run folder. Other packages call `luthier.train.run` only."""
