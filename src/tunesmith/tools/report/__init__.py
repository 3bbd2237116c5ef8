"""The page of runs, written once (`report`) or served (`watch`)."""

COMMANDS = {
    "train": {
        "watch": (
            "tunesmith.tools.report.cli_watch",
            "serve the page about runs, always up to date",
        ),
        "report": ("tunesmith.tools.report.cli", "write a page about runs and compare them"),
    },
}
