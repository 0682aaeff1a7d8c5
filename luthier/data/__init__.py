"""From rows to token ids with per-token labels.

A row of a file becomes an example (`formats`), an example becomes token ids and labels (`render`), and the
documents of a run are kept in one memory-mapped file (`dataset`). `preview` shows the result to the user.
"""
