"""The demo: a tiny base model, instruction data, the scripts that made both, and one whole run on them.

`words`, `stories`, `lessons` and `corpus` write the text from which `base_model` trains the model; `tasks`
writes the instruction rows; `command` is `luthier demo`.
"""
