"""Tools around the training engine. Each tool is one folder.

A tool imports the engine but no other tool. The engine imports no tool. Therefore the folder of a
tool can be removed without changes to other code. The `__init__.py` of a tool lists its commands,
and the command line finds them there.
"""
