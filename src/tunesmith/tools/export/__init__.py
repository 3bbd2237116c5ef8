"""The commands `export` and `merge`, for llama.cpp, Ollama, vLLM and Transformers.

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
    },
}
