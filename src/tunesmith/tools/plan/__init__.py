"""The command `plan`, which estimates memory and time of a recipe on any hardware."""

COMMANDS = {
    "machines": {
        "plan": ("tunesmith.tools.plan.cli", "estimate memory and time on any hardware"),
    },
}
