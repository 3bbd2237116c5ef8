"""Text models inside vision-language checkpoints: which families, and where the text model is.

Only the text model is built and trained. The other parts (vision tower, projector, audio) are not
read; what is written holds them byte for byte. No torch is imported here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Composite:
    """A family of vision-language models, and where its class in Transformers has the text model.

    Attributes:
        text_types: model types of the text part; the first is that of a config that names none.
        decoder: prefix of the names that are `model.` in the text model.
        head: prefix of the output layer.
    """

    text_types: tuple[str, ...]
    decoder: str = "model.language_model."
    head: str = "lm_head."

    def name_in_whole(self, name: str) -> str:
        """The name that a module or parameter of the text model has in the whole model."""
        return _replace_prefix(name, (("model.", self.decoder), ("lm_head.", self.head)))

    def name_in_text(self, name: str) -> str:
        """The opposite; a name outside of the text model stays as it is."""
        return _replace_prefix(name, ((self.decoder, "model."), (self.head, "lm_head.")))


COMPOSITES = {
    "qwen3_5": Composite(("qwen3_5_text",)),
    "qwen3_5_moe": Composite(("qwen3_5_moe_text",)),
    "gemma3": Composite(("gemma3_text",)),
    "gemma4": Composite(("gemma4_text",)),
    "mistral3": Composite(("mistral", "ministral3")),
    "llama4": Composite(
        ("llama4_text",), decoder="language_model.model.", head="language_model.lm_head."
    ),
}

# Of the names on the disk, whatever the class calls them: prefix -> prefix in the text model.
STORED_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


def _replace_prefix(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    """The name with the first prefix that it has replaced; a module's name may end with its
    prefix's last part.
    """
    for prefix, replacement in prefixes:
        # With a dot at the end: "model" itself has the prefix "model.", and "models" has not.
        if f"{name}.".startswith(prefix):
            return (replacement + f"{name}.".removeprefix(prefix)).removesuffix(".")
    return name


def stored_text_name(name: str) -> str:
    """The name in the text model of a tensor that a vision-language checkpoint stores so."""
    return _replace_prefix(name, STORED_PREFIXES)


def is_stored_text_name(name: str) -> bool:
    """Tell whether a stored tensor is of the text model by its name alone."""
    return stored_text_name(name) != name
