"""Many adapters over one loaded base: a grid of values, closing table."""

COMMANDS = {
    "train": {
        "sweep": ("tunesmith.tools.sweep.cli", "train many adapters on one base and find the best"),
    },
}
