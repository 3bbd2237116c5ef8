"""The commands `chat`, `generate` and `eval`: generation and scoring of a model's answers."""

COMMANDS = {
    "use the result": {
        "chat": ("tunesmith.tools.evaluate.cli_chat", "chat with a trained model in the terminal"),
        "generate": (
            "tunesmith.tools.evaluate.cli_generate",
            "generate answers for the rows of a file",
        ),
        "eval": (
            "tunesmith.tools.evaluate.cli",
            "evaluate a run on held-out rows against its base",
        ),
    },
}
