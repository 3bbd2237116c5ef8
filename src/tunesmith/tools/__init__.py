"""Tools around the engine, a folder each.

A tool imports the engine, and no other tool; the engine imports none, so that a folder can go. The
command line finds the commands that the `__init__` of each lists.
"""
