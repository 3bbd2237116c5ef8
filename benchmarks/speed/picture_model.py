"""Writer of a small vision-language model with random weights, and of rows with pictures for it.

    python benchmarks/speed/picture_model.py --tokenizer DIR --output random-vision
    python benchmarks/speed/against_trl.py --pictures --dtype fp32 \\
        --model random-vision/model --data random-vision/rows.jsonl

The model is a Gemma 3, because TRL can load its processor without torchvision. It has 8 layers of
width 576, and 64 tokens per picture. A row has zero, one or two pictures, and answers of different
lengths.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, Gemma3Config

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}
SIDE, PATCH, TOKENS = 224, 14, 64
WORDS = (
    "a of the red lamp stands on an old table near some blue window while two birds look at it"
).split()


def write_model(folder: Path, tokenizer_folder: str) -> None:
    """Write the config, the weights, the tokenizer and the processor."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, **PARTS)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "query_pre_attn_scalar": 64, "vocab_size": len(tokenizer),
        "sliding_window": 512, "max_position_embeddings": 4096, **special,
    }  # fmt: skip
    tower = {
        "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 3, "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    ids = {
        "image_token_id": tokenizer.convert_tokens_to_ids(PARTS["image_token"]),
        "boi_token_id": tokenizer.convert_tokens_to_ids(PARTS["boi_token"]),
        "eoi_token_id": tokenizer.convert_tokens_to_ids(PARTS["eoi_token"]),
    }
    config = Gemma3Config(
        text_config=text, vision_config=tower, mm_tokens_per_image=TOKENS, **ids, **special
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    processor = {"processor_class": "Gemma3Processor", "image_seq_length": TOKENS}
    pixels = {
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
        "size": {"height": SIDE, "width": SIDE},
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))


def write_rows(folder: Path, count: int) -> None:
    """Write pictures of one color each, and rows that ask what the pictures show."""
    rng = random.Random(0)
    lines = []
    for n in range(count):
        images = []
        for i in range(rng.choice([0, 1, 1, 2])):
            image = Image.new("RGB", (320, 240), tuple(rng.randrange(256) for _ in range(3)))
            image.save(folder / f"{n}-{i}.png")
            images.append(f"{n}-{i}.png")
        # Only few answers are long, as in most data sets.
        answer = " ".join(rng.choices(WORDS, k=int(rng.expovariate(1 / 60)) + 3))
        question = "<image>" * len(images) + "What is shown?"
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": messages, "images": images}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))


def main() -> None:
    """Write the model and the rows to one folder."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--tokenizer", required=True)
    p.add_argument("--output", required=True, type=Path)
    p.add_argument("--rows", type=int, default=256)
    a = p.parse_args()
    a.output.mkdir(parents=True)
    write_model(a.output / "model", a.tokenizer)
    write_rows(a.output, a.rows)


if __name__ == "__main__":
    main()
