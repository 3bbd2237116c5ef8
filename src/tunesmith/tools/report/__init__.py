"""The page of runs, written once (`report`) or refreshed (`watch`)."""

COMMANDS = {
    "train": {
        "watch": ("tunesmith.tools.report.cli_watch", "watch runs on a live web page"),
        "report": ("tunesmith.tools.report.cli", "compare runs on an offline page"),
    },
}
