"""A trained model written for others: merged, or in the formats of programs that serve it.

Weights are read band by band from the base's files and the adapter's, changed and written; no more
than a band of one matrix is in memory.
"""

COMMANDS = {
    "use the result": {
        "merge": (
            "tunesmith.tools.export.cli_merge",
            "merge an adapter into its base and check the result",
        ),
        "export": (
            "tunesmith.tools.export.cli",
            "export to llama.cpp, Ollama, vLLM or Transformers",
        ),
        "push": (
            "tunesmith.tools.export.cli_push",
            "upload a trained model to the Hugging Face Hub",
        ),
    },
}
