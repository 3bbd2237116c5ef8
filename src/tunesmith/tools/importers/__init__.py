"""Import of other tools' configurations: one table for each tool (`tables/`), which one translator
(`translate.py`) applies to a file (`source_config.py`). `translation.py` holds the recipe and the
notes on keys that it does not contain.
"""

COMMANDS = {
    "start here": {
        "import": (
            "tunesmith.tools.importers.cli",
            "convert another tool's configuration to a recipe",
        ),
    },
}
