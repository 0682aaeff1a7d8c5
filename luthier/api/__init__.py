"""Luthier from Python: doors for notebooks that were written for Unsloth and TRL, and the plain road below them.

The doors translate: what a notebook says becomes a Config (`translate`, `rows`), the model that it holds becomes the
model of a run for as long as the run lasts (`peft_models`), and `train.run` does the rest. Nothing here trains.
"""
