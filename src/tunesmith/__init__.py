"""tunesmith: fine-tune open-weight language models on the hardware that people have."""

__version__ = "0.1.0"
