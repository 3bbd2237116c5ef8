"""The commands `bench` and `selfcheck`.

`bench` measures the training speed of a recipe. `selfcheck` checks that training on several ranks
gives the same results as training in one process.
"""

COMMANDS = {
    "machines": {
        "selfcheck": (
            "tunesmith.tools.bench.cli_selfcheck",
            "check that several ranks match one process",
        ),
        "bench": ("tunesmith.tools.bench.cli", "measure a recipe's training speed and MFU"),
    },
}
