"""The commands `report` and `watch`, which write or serve an HTML page about runs."""

COMMANDS = {
    "train": {
        "watch": (
            "tunesmith.tools.report.cli_watch",
            "serve a page about runs and keep it up to date",
        ),
        "report": ("tunesmith.tools.report.cli", "write a page about runs and compare them"),
    },
}
