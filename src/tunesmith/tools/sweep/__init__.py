"""Many adapters over one loaded base: search space, halving, closing table."""

COMMANDS = {
    "train": {
        "sweep": ("tunesmith.tools.sweep.cli", "train many adapters on one base and find the best"),
    },
}
