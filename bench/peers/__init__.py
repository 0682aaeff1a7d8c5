"""One script per contender: `python -m bench.peers.NAME job.json` trains as the job says and writes what it saw.

They run in environments of their own, where nothing but the contender is installed; so they import from this
folder only `common`, which needs the standard library alone.
"""
