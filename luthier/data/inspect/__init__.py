"""`luthier inspect data`: whether a dataset looks large enough, balanced, free of repeats, short enough and whole, and
its worst rows.

`sources` finds the rows and what they are, `views` the texts in a row, `checks` what is wrong with a row; `collect`
goes through all of them once; `judge`, `repeats` and `whole` judge, `command` shows it. Nothing is claimed that was not
counted.
"""
