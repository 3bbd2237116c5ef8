"""Measurement of training steps of a vision-language model with random weights and random pictures.

    python benchmarks/speed/picture_steps.py --family qwen2_5_vl --json out.json \\
        [--picture 1024x768] [--small]

The model has the shape of a real model. In the first measurement, all pictures have the same size.
In the second measurement, each picture has a different size, so the difference is the cost of new
sizes. One step of the first measurement is profiled. `planned_gib` in the report is the peak memory
that the plan predicted. --small uses the tiny model of the tests, to test the script on a CPU. The
script requires a checkout, because tests/vision.py writes the models.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from step_reports import read_profile

from tunesmith.config.load import from_mapping
from tunesmith.tools.bench import measure

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
import vision

# Shapes of Qwen2.5-VL 7B and Gemma 3 4B from their config.json, and the picture sizes of their
# processors.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "text": {
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128,
            "vocab_size": 152064, "max_position_embeddings": 128000,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24],
            },
        },
        "tower": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "out_hidden_size": 3584, "patch_size": 14, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "pixels": {
            "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14,
            "size": {"shortest_edge": 3136, "longest_edge": 12845056},
        },
    },
    "gemma3": {
        "text": {
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "vocab_size": 262208, "max_position_embeddings": 131072,
            "sliding_window": 1024, "query_pre_attn_scalar": 256,
        },
        "tower": {
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
            "num_attention_heads": 16, "image_size": 896, "patch_size": 14,
        },
        "whole": {"mm_tokens_per_image": 256, "tie_word_embeddings": True},
        "processor": ("Gemma3Processor", {"image_seq_length": 256}),
        "pixels": {
            "image_processor_type": "Gemma3ImageProcessor", "size": {"height": 896, "width": 896},
        },
    },
}  # fmt: skip
SIZES = 64  # number of pictures, and of different sizes in the second measurement
# In the second measurement, the sides of a picture are multiplied by a factor from 1 - SIZE_SPREAD
# to 1 + SIZE_SPREAD. The photos in a folder have different sizes too, and a GPU may need extra time
# for each new size.
SIZE_SPREAD = 0.25
CELL_PIXELS = 16  # side of a square of one color, before the colors are blended


def write_model(folder: Path, family: str, *, small: bool) -> None:
    """Write the config, the processor and a byte tokenizer to an existing folder."""
    of = vision.FAMILIES[family]
    vision.MORE_FAMILIES["measured"] = of.but(
        model_type=family, **({} if small else SHAPES[family])
    )
    vision.write_processor(folder, "measured")


def draw_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Draw SIZES sizes with the aspect ratio of `size`."""
    width, height = size
    factors = np.random.default_rng(0).uniform(1 - SIZE_SPREAD, 1 + SIZE_SPREAD, SIZES)
    return [(int(width * factor), int(height * factor)) for factor in factors]


def write_drawn_rows(folder: Path, sizes: Sequence[tuple[int, int]]) -> None:
    """Write JPEG pictures of random colors, and rows that ask for a color of each picture."""
    random = np.random.default_rng(0)
    rows = []
    for number, (width, height) in enumerate(sizes):
        cells = (height // CELL_PIXELS + 1, width // CELL_PIXELS + 1, 3)
        colors = random.integers(0, 256, cells, dtype=np.uint8)
        picture = Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.jpg", quality=90)
        question = f"<image>Picture {number}: which color is at the top left?"
        answer = f"Red {colors[0, 0, 0]}, green {colors[0, 0, 1]}, blue {colors[0, 0, 2]}."
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        rows.append(json.dumps({"messages": messages, "images": [f"{number}.jpg"]}) + "\n")
    (folder / "drawn.jsonl").write_text("".join(rows), encoding="utf-8")


def measure_pictures(
    model: Path, size: tuple[int, int], folder: Path, file: Path, *, small: bool
) -> dict[str, Any]:
    """Measure steps on pictures of one size, and then on pictures of different sizes.

    Args:
        file: the file of the report, which is written after each measurement.
    """
    planned = []
    build = measure.build

    def noted(*arguments: Any, **options: Any) -> Any:
        session = build(*arguments, **options)
        planned.append(session.plan.memory.total / 2**30)
        return session

    measure.build = noted
    cases = {"one size": [size] * SIZES, f"{SIZES} sizes": draw_sizes(size)}
    report: dict[str, Any] = {}
    for name, sizes in cases.items():
        place = folder / name
        (place / "rows").mkdir(parents=True)
        (place / "run").mkdir()
        write_drawn_rows(place / "rows", sizes)
        values = {
            "model": {"name": str(model), "dtype": "fp32" if small else "bf16", "vision": True},
            "adapter": {"kind": "lora", "rank": 8},
            "data": {
                "train": {"source": str(place / "rows/drawn.jsonl"), "format": "messages"},
                "seq_len": 256 if small else 4096,
            },
            "train": {"global_batch": f"{512 if small else 16384} tokens"},
            "profile": {"wait": 0, "warmup": 1, "active": 1, "cycles": 1},
            "output_dir": str(place / "run"),
        }
        run = from_mapping(values, where=name, base=place)
        traces = None if report else place / "traces"
        steps = (1, 0) if small else (5, 3)
        measured = measure.measure(measure.BenchPlan(run, *steps, "random", traces), place / "run")
        report[name] = {"figures": vars(measured.figures), "planned_gib": planned[-1]}
        if traces:
            report[name] |= read_profile({"profile": {"traces": measured.traces}, "recipe": values})
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def main() -> None:
    """Measure one model family."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=SHAPES, required=True)
    parser.add_argument("--picture", default="1024x768")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    width, height = map(int, args.picture.split("x"))
    size = (112, 56) if args.small else (width, height)
    with tempfile.TemporaryDirectory(prefix="tunesmith-pictures-") as name:
        folder = Path(name)
        (folder / "model").mkdir()
        write_model(folder / "model", args.family, small=args.small)
        report = measure_pictures(folder / "model", size, folder, args.json, small=args.small)
    for case, found in report.items():
        figures = found["figures"]
        print(
            f"{case}: {figures['tokens_per_second']:,.0f} tokens/s, peak memory "
            f"{figures['peak_memory_gib']:.1f} GiB, planned {found['planned_gib']:.1f} GiB"
        )


if __name__ == "__main__":
    main()
