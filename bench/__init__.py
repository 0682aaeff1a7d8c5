"""Side-by-side measurements: Luthier and its neighbours on the same rows, in turn, on the same machine.

`python -m bench.cpu` is the whole comparison without a GPU; `bench/results/` holds what these programs wrote,
and `docs/benchmarks.md` is made from it by `python -m bench.table`.
"""
