"""The version of tunesmith."""

__version__ = "0.1.0"
