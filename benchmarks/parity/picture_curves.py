"""Comparison of tunesmith's loss curves with a plain loop of Transformers and PEFT, for rows with
pictures.

    python benchmarks/parity/picture_curves.py --json out.json
    python benchmarks/parity/picture_curves.py qwen3_vl gemma3       # only some families

Each family is a small random model in fp32 with its processor and a byte tokenizer
(`tests/vision.py`). Both sides start from the same weights and train on the same rows of drawn
figures in the same order, with a constant learning rate. The plain loop renders the chat template,
opens the pictures and computes all inputs with Transformers' processor, with one row per forward.
tunesmith packs the rows.

For each family three numbers are printed: the largest relative difference of the loss, the largest
difference of the trained weights after the last step, and the relative change of the plain loop's
first losses if the colors of all pictures are inverted. The last number shows whether the pictures
influence the loss.

Transformers' `AutoProcessor` requires torchvision. Without torchvision, the processors are built
from their classes. This does not work for PixtralProcessor, and for SmolVLMProcessor, which also
requires num2words.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from families_curves import as_json
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor

from parity import compare, write_first_adapter

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import vision
from figures import draw_figures
from recipes import make_run
from tunesmith.config.schema import Run
from tunesmith.start.run import train

STEPS, BATCH, ROWS = 20, 6, 24
RATES = {"lora": 2e-3, "none": 5e-4}
# Standard deviation of the noise that is added to each weight. It is large enough to detect wrong
# positions of picture tokens: positions as in a text change the first loss by 3e-4.
SPREAD = 0.15
# A larger `eps` of AdamW than the default. With the default, a gradient that is only rounding would
# cause an update as large as other gradients.
EPS = 1e-5

# Parts of the names of projector weights in the families of this benchmark
PROJECTORS = (
    "multi_modal_projector",
    ".merger.",
    "deepstack_merger_list",
    "connector",
    "embed_vision",
)

Row = dict[str, Any]
Change = Callable[[Image.Image], Image.Image]


def write_model(family: str, folder: Path) -> Path:
    """Write a random model of a family and its processor. Return the folder."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    vision.write_processor(folder, family)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * SPREAD)
        for name, parameter in model.named_parameters():
            # See write_model in families_curves.py.
            if config.model_type == "gemma4" and name.endswith("q_norm.weight"):
                parameter.mul_(parameter.numel() ** -0.5)
    model.save_pretrained(folder)
    return folder


def write_rows(folder: Path, count: int) -> Path:
    """Write rows with zero to two pictures of different sizes. Return the file.

    `<image>` marks the place of a picture in the text. Every fourth row has a second turn.
    """
    rng = random.Random(1)
    folder.mkdir(parents=True, exist_ok=True)

    def draw(name: str) -> str:
        image, text = draw_figures(rng)
        size = (rng.randint(30, 130), rng.randint(30, 130))
        image.resize(size).save(folder / name)
        images.append(name)
        return text

    lines = []
    for n in range(count):
        images: list[str] = []
        messages: list[dict[str, str]] = []

        def add(question: str, answer: str, messages: list[dict[str, str]] = messages) -> None:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})

        kind = n % 4
        if kind == 0:
            add(f"What is {n} + {n + 1}?", f"It is {2 * n + 1}.")
        elif kind == 1:
            add("<image>What is drawn?", draw(f"{n}.png"))
        elif kind == 2:
            both = f"{draw(f'{n}-0.png')}, and {draw(f'{n}-1.png')}"
            add(f"Here is <image>\nand here <image> ({n}). What is drawn?", both)
        else:
            add("What is drawn? <image>", draw(f"{n}-0.png"))
            add("<image> And here?", draw(f"{n}-1.png"))
        lines.append(json.dumps({"messages": messages, "images": images}) + "\n")
    file = folder / "figures.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def recipe(model: Path, folder: Path, rows: Path, kind: str, steps: int, *, projector: bool) -> Run:
    """Return the recipe for tunesmith.

    The order of the rows and the learning rate are fixed. A micro batch is one packed row.
    """
    adapter = {"kind": "lora", "rank": 4, "alpha": 8} if kind == "lora" else {"kind": "none"}
    return make_run(
        model,
        folder,
        held=False,
        model={"vision": True, "train_projector": projector},
        data={
            "train": {"source": str(rows), "format": "messages"},
            "shuffle": False,
            "seq_len": 512,
        },
        train={
            "duration": f"{steps} steps",
            "global_batch": f"{BATCH} examples",
            "micro_batch": "512 tokens",
            "schedule": "constant",
            "warmup": "0 steps",
            "learning_rate": RATES[kind],
            "eps": EPS,
        },
        checkpoint={"every": None},
        adapter=adapter,
    )


def load_processor(folder: Path) -> Any:
    """Load Transformers' processor with the image processor for Pillow, as in tunesmith."""
    import transformers
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    if find_spec("torchvision"):
        processor = AutoProcessor.from_pretrained(folder)
        processor.image_processor = image_processor
        return processor
    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    kind = getattr(transformers, settings.pop("processor_class"))
    changes = {"check_argument_for_proper_class": lambda *_: None}
    unchecked = type(kind.__name__, (kind,), changes)
    parts = {"image_processor": image_processor, "tokenizer": AutoTokenizer.from_pretrained(folder)}
    return unchecked(*[parts.get(name) for name in unchecked.get_attributes()], **settings)


@dataclass(frozen=True)
class Inputs:
    """A row for Transformers: all arguments of the model, and the unshifted labels."""

    arguments: dict[str, Tensor]
    labels: Tensor


def read_row(row: Row, folder: Path, processor: Any, change: Change | None = None) -> Inputs:
    """Render a row, open its pictures and compute the inputs.

    Only the answers and their end-of-turn tokens are supervised.
    """
    messages = []
    for message in row["messages"]:
        texts = message["content"].split("<image>")
        parts = [{"type": "text", "text": texts[0]}]
        for text in texts[1:]:
            parts += [{"type": "image"}, {"type": "text", "text": text}]
        messages.append(
            {"role": message["role"], "content": [p for p in parts if p.get("text", 1)]}
        )
    pictures = [ImageOps.exif_transpose(Image.open(folder / name)) for name in row["images"]]
    pictures = [change(picture) if change else picture for picture in pictures]

    tokenizer = processor.tokenizer
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    arguments = dict(
        processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt")
    )
    ids = arguments["input_ids"][0]
    begin = tokenizer("<|im_start|>assistant\n", return_tensors="pt")["input_ids"][0]
    labels = torch.full_like(ids, -100)
    for start in range(len(begin), len(ids)):
        if torch.equal(ids[start - len(begin) : start], begin):
            length = int((ids[start:] == tokenizer.eos_token_id).nonzero()[0]) + 1
            labels[start : start + length] = ids[start : start + length]
    answers = [m["content"][0]["text"] for m in messages if m["role"] == "assistant"]
    learnt = "".join(answer + tokenizer.eos_token for answer in answers)
    assert tokenizer.decode(labels[labels != -100]) == learnt
    return Inputs(arguments, labels)


def sum_losses(model: torch.nn.Module, row: Inputs) -> Tensor:
    """Return the summed cross-entropy over the supervised tokens of a row.

    The softmax is computed in float64, as in reference.py.
    """
    logits = model(**row.arguments, use_cache=False).logits[0].double()
    return F.cross_entropy(logits[:-1], row.labels[1:], ignore_index=-100, reduction="sum")


class Plain:
    """The plain loop of Transformers and PEFT."""

    def __init__(
        self, folder: Path, adapter: Path | None, rows: Path, attention: str, *, projector: bool
    ) -> None:
        from peft import PeftModel
        from transformers import AutoModelForImageTextToText

        self.folder = rows.parent
        self.processor = load_processor(folder)
        self.rows: list[Row] = [json.loads(line) for line in rows.read_text().splitlines()]
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        )
        self.inputs = self.read_rows()
        self.is_adapted = adapter is not None
        if adapter is not None:
            model = PeftModel.from_pretrained(
                model, adapter, is_trainable=True, autocast_adapter_dtype=False
            )
        else:
            for name, parameter in model.named_parameters():
                is_text = "language_model" in name or "text_model" in name
                is_trained = is_text or (projector and any(part in name for part in PROJECTORS))
                parameter.requires_grad_(is_trained)
            model.get_output_embeddings().weight.requires_grad_(True)
        self.model: Any = model.train()

    def read_rows(self, change: Change | None = None) -> list[Inputs]:
        return [read_row(row, self.folder, self.processor, change) for row in self.rows]

    def first_losses(self, inputs: list[Inputs]) -> Tensor:
        """Compute the loss of each row before any update."""
        with torch.no_grad():
            return torch.stack([sum_losses(self.model, row) for row in inputs])

    def steps(self, steps: int, rate: float) -> Iterator[float]:
        """Train, and yield the loss of each step before its update."""
        rows = self.inputs
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, eps=EPS)
        for step in range(steps):
            batch = [rows[(step * BATCH + i) % len(rows)] for i in range(BATCH)]
            tokens = sum(int((row.labels[1:] != -100).sum()) for row in batch)
            loss = 0.0
            for row in batch:
                part = sum_losses(self.model, row) / tokens
                part.backward()
                loss += float(part.detach())
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield loss

    def weights(self) -> dict[str, Tensor]:
        """Return the adapter with PEFT's names in a file, or all weights after full fine-tuning."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.model) if self.is_adapted else self.model.state_dict()


def read_weights(folder: Path, kind: str) -> dict[str, Tensor]:
    """Read the weights that a run wrote, with the names of `Plain.weights`."""
    from transformers import AutoModelForImageTextToText

    if kind == "lora":
        return load_file(folder / "adapter_model.safetensors")
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest absolute difference of all values.

    For comparison, an update changes a value by at most the learning rate.
    """
    if ours.keys() != theirs.keys():
        raise ValueError(
            f"these weights exist on one side only: {sorted(ours.keys() ^ theirs.keys())[:9]}"
        )
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def compare_family(
    family: str,
    folder: Path,
    kind: str,
    steps: int,
    attention: str = "sdpa",
    *,
    projector: bool = False,
) -> dict[str, Any]:
    """Train with tunesmith and with the plain loop.

    Return the losses, their differences, the difference of the weights, and how much the pictures
    influence the losses.
    """
    model = write_model(family, folder / "model")
    rows = write_rows(folder / "rows", ROWS)
    run = recipe(model, folder, rows, kind, steps, projector=projector)
    adapter = write_first_adapter(run, folder / "first") if kind == "lora" else None
    plain = Plain(model, adapter, rows, attention, projector=projector)
    seen = plain.first_losses(plain.inputs)
    others = plain.first_losses(plain.read_rows(ImageOps.invert))
    ours = [record.loss for record in train(run, quiet=True).records]
    theirs = list(plain.steps(steps, RATES[kind]))
    written = read_weights(Path(run.output_dir) / "final", kind)
    return {
        "difference": compare(ours, theirs),
        "weights": largest_difference(written, plain.weights()),
        "pictures": float((others - seen).abs().sum() / seen.sum()),
        "ours": ours,
        "plain": theirs,
    }


def main() -> None:
    """Compare LoRA and full fine-tuning for each family."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    families = [*vision.FAMILIES, *vision.MORE_FAMILIES]
    p.add_argument(
        "families", nargs="*", metavar="FAMILY", help=f"default: all of {', '.join(families)}"
    )
    p.add_argument("--kinds", nargs="+", default=["lora", "none"], choices=["lora", "none"])
    p.add_argument("--steps", type=int, default=STEPS)
    p.add_argument("--attention", default="sdpa", help="attention of the plain loop")
    p.add_argument("--projector", action="store_true", help="also train the projector completely")
    p.add_argument("--json", help="write the results to this file")
    options = p.parse_args()
    report: dict[str, Any] = {
        "command": [Path(word).name for word in sys.argv],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "rows": [],
    }
    for family in options.families or families:
        for kind in options.kinds:
            with tempfile.TemporaryDirectory() as name:
                result = compare_family(
                    family,
                    Path(name),
                    kind,
                    options.steps,
                    options.attention,
                    projector=options.projector,
                )
            difference = result["difference"]
            text = (
                f"{family:18}{kind:5} first {difference['first']:.1e}  all {difference['all']:.1e}"
            )
            text += f"  weights {result['weights']:.1e}  pictures {result['pictures']:.1e}"
            text += f"  loss {result['plain'][0]:.4f} -> {result['plain'][-1]:.4f}"
            print(text, flush=True)
            report["rows"].append({"family": family, "trained": kind, **result})
            if options.json:
                Path(options.json).write_text(as_json(report), encoding="utf-8")


if __name__ == "__main__":
    main()
