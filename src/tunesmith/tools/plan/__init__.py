"""Memory, time and cost of a recipe on any hardware."""

COMMANDS = {
    "machines": {
        "plan": ("tunesmith.tools.plan.cli", "estimate memory, time and cost on any hardware"),
    },
}
