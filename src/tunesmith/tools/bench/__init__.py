"""The command `bench`, which measures the training speed of a recipe."""

COMMANDS = {
    "machines": {
        "bench": ("tunesmith.tools.bench.cli", "measure a recipe's training speed and MFU"),
    },
}
