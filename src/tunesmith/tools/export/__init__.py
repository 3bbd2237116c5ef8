"""The commands `export`, `merge` and `push`, for llama.cpp, Ollama, vLLM, Transformers and the Hub.

Matrices are processed in bands of rows: a band is read from the files of base model and adapter,
merged and written. Therefore only a few bands are in memory at a time.
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
