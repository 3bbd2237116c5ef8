"""The speed at which a recipe trains, measured on the loop of `train` itself."""

COMMANDS = {
    "machines": {
        "selfcheck": (
            "tunesmith.tools.bench.cli_selfcheck",
            "check that several ranks match one process",
        ),
        "bench": ("tunesmith.tools.bench.cli", "measure a recipe's training speed and MFU"),
    },
}
