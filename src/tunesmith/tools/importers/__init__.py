"""Recipes of other tools as recipes of ours: read (`source_config.py`), their keys translated
(`tools.py`), and written with what is not carried over, and why (`translation.py`).
"""

COMMANDS = {
    "start here": {
        "import": (
            "tunesmith.tools.importers.cli",
            "convert another tool's configuration to a recipe",
        ),
    },
}
