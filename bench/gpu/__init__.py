"""Luthier beside its neighbours on one NVIDIA GPU; `python -m bench.gpu`, see `__main__`."""
