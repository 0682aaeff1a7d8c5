"""What runs came to, for people to read.

Everything here is read from run folders, so that a report can be made of any run at any time, on any machine that
has its folder: no model is opened, and nothing of `train` is needed.
"""
