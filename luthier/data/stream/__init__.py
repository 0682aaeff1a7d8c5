"""Datasets that are larger than disk or memory: rows are read while training goes on, and never all of them.

    sources  an entry's rows from any place on, and where it stands
    mix      whose row is next
    blocks   `shuffle_buffer_size` rows at a time: tokenised in memory, shuffled, cut into steps
    loader   those steps for a run; the block after is made while one is trained
    prepare  what there is to know before the first step: a beginning of the data, and what is held out

A block follows from the places where the sources stand at its beginning, and a few documents that the one before
left over. So a checkpoint holds those places instead of data, and a run goes on by reading two blocks.
"""
