"""Configs of other tools as configs of ours: `luthier convert`, and `luthier train` of an Axolotl config.

    axolotl       a YAML of Axolotl's
    llamafactory  a YAML of LLaMA-Factory's (its v0 schema), with the datasets that `dataset_info.json` names
    script        a notebook or script for Unsloth, TRL or PEFT, of which the syntax tree is read and nothing is run

What each key becomes is in tables (`*_keys`, `arguments`); the modules beside them have what a table cannot say. Each
key of theirs ends in one of four lists (`report`): carried over, without effect here, not supported, unknown. A default
of theirs that is not ours is written into the result, so that the result alone says what is trained.
"""
