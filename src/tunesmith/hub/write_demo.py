"""Main module of the child process that writes the demo model's folder: FILE FOLDER.

It runs in a child process, so that the parent imports neither torch nor Transformers.
"""

import sys
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def write_demo(file: Path, folder: Path) -> None:
    """Write the weights of a .gguf file in fp32, its config and its tokenizer to a folder."""
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # SmolLM2 splits every digit from its neighbors. Transformers reads only the split of GPT-2 from
    # a .gguf file, which gives other token ids for digits such as a half.
    splits = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(splits)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    write_demo(Path(sys.argv[1]), Path(sys.argv[2]))
