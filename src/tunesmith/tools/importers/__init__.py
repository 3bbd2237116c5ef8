"""Import of other tools' configurations.

Each tool has one table in `tables/`. The translator (`translate.py`) applies a table to a file of
the tool (`source_config.py`). The result is a `Translation` (`translation.py`): the recipe, and
notes on keys that could not be translated.
"""

COMMANDS = {
    "start here": {
        "import": (
            "tunesmith.tools.importers.cli",
            "convert another tool's configuration to a recipe",
        ),
    },
}
