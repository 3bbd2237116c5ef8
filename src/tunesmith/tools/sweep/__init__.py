"""The command `sweep`, which trains many adapters on one base model and compares them."""

COMMANDS = {
    "train": {
        "sweep": ("tunesmith.tools.sweep.cli", "train many adapters on one base and find the best"),
    },
}
