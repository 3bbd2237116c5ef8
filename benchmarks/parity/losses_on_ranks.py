"""Losses of a recipe on several ranks beside those of one process: a table of what is trained x how
ranks share it.

    python benchmarks/parity/losses_on_ranks.py --model DIR --data rows.json --worlds 2 4 --json out.json
    python benchmarks/parity/losses_on_ranks.py --tensor --worlds 2 4 8 --json out.json           # a small Llama and rows that it makes
    python benchmarks/parity/losses_on_ranks.py --tensor --worlds 2 4 8 --float64 --json out.json
    python benchmarks/parity/losses_on_ranks.py --tensor --worlds 2 --compile on --json out.json
    python benchmarks/parity/losses_on_ranks.py --mixture --worlds 2 4 --json out.json            # a small mixture, its experts over ranks too
    python benchmarks/parity/losses_on_ranks.py --write docs/measurements/ranks.md out.json ...                # the tables of the page; --check compares

Each row is `train` on ranks that torchrun starts on this machine, with gloo on a CPU, in fp32
unless asked otherwise: 20 steps, in which the gradient is clipped. Printed: the largest relative
difference of the loss and of the gradient norm to one uncompiled process, in the first step and in
all. Rows of --data are alpaca-like JSON. Rows that are in the JSON file are not measured again, so
a command that was stopped goes on where it was.

With dropout the masks depend on which examples share a micro batch, and on its length: shards are
compared with copies, and copies and tensor groups with one process. Neither bitsandbytes nor
Transformers computes in float64: the latter's norm and rotary embedding are replaced, and nf4 is
left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

TRAINED: dict[str, dict[str, Any]] = {
    "full": {"adapter": {"kind": "none"}},
    "LoRA": {},
    "LoRA on nf4": {"model": {"quantize": "nf4"}},
    "LoRA, dropout 0.1": {"adapter": {"dropout": 0.1}},
}
NO_FLOAT64 = ("LoRA on nf4",)
BEGIN = "<!-- Written by: python benchmarks/parity/losses_on_ranks.py --write docs/measurements/ranks.md docs/measurements/ranks-*.json -->\n"
END = "<!-- The end of what it writes. -->\n"
FIGURES = {"loss_first": 1e-6, "loss_all": 1e-4, "norm_first": 1e-6, "norm_all": 1e-3}
FLOAT64 = 1e-9  # of all figures
# Heads, key-value heads and widths are divisible by 8, and the columns of a row-parallel layer are
# nf4 blocks of 64 on 8 ranks.
SMALL = {
    "vocab_size": 272, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16,
    "num_key_value_heads": 8, "max_position_embeddings": 256, "tie_word_embeddings": True, "bos_token_id": None,
}  # fmt: skip
SMALL_MIXTURE = {
    "vocab_size": 272, "hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "num_experts": 16, "num_experts_per_tok": 4, "max_position_embeddings": 256,
    "tie_word_embeddings": True, "bos_token_id": None,
}  # fmt: skip
Curve = list[list[float]]  # loss and gradient norm of each step


@dataclass(frozen=True)
class Case:
    """A row of the table: what is trained, and the mesh."""

    model: str
    dtype: str
    compile: str
    trained: str
    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    experts: int = 1

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard * self.tensor

    @property
    def mesh(self) -> str:
        sizes = {"replicate": self.replicate, "shard": self.shard, "tensor": self.tensor}
        mesh = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        if self.experts > 1:
            mesh += f", experts {self.experts}"
        return mesh or "one process"

    @property
    def reference(self) -> Case:
        """What its numbers should be."""
        if "dropout" in self.trained and self.shard > 1:
            return replace(self, replicate=self.replicate * self.shard, shard=1)
        return Case(self.model, self.dtype, "off", self.trained)


def cases(a: argparse.Namespace, model: str) -> list[Case]:
    """The rows that were asked for, with one process first; without tensor parallelism unless
    asked.
    """
    dtype, found = "float64" if a.float64 else a.dtype, []
    for what in a.trained:
        if a.float64 and what in NO_FLOAT64:
            continue
        found.append(Case(model, dtype, "off", what))
        for world in sorted({1, *a.worlds}) if a.compile == "on" else a.worlds:
            sizes = [n for n in range(1, world + 1) if world % n == 0]
            meshes = [(r, s, world // r // s) for r in sizes for s in sizes if world % (r * s) == 0]
            meshes = [mesh for mesh in meshes if a.tensor or mesh[2] == 1]
            for mesh in meshes:
                # All data ranks divide experts, or as many as each of these.
                groups = [n for n in sizes if mesh[0] * mesh[1] % n == 0] if a.mixture else [1]
                found += [Case(model, dtype, a.compile, what, *mesh, n) for n in groups]
    return list(
        dict.fromkeys(
            case for row in found for case in (row.reference.reference, row.reference, row)
        )
    )


def write_small(folder: Path, *, mixture: bool = False) -> None:
    """A random Llama of the shape SMALL, or a Qwen3 of SMALL_MIXTURE, with a byte tokenizer, and rows.jsonl, as SFT learns to
    count.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        PreTrainedTokenizerFast,
        Qwen3MoeConfig,
    )

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.save_pretrained(folder / "small")
    torch.manual_seed(0)
    tokens = {"eos_token_id": 256, "pad_token_id": 256}
    config = LlamaConfig(**SMALL, **tokens)
    if mixture:
        config = Qwen3MoeConfig(**SMALL_MIXTURE, **tokens, initializer_range=0.05)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "small")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for i in range(400):
            numbers = " ".join(str(i + k * (i % 7 + 1)) for k in range(4 + i % 9))
            file.write(
                json.dumps({"prompt": f"Count from {i} by {i % 7 + 1}: ", "completion": numbers})
                + "\n"
            )


def recipe(a: argparse.Namespace, folder: Path, case: Case) -> dict[str, Any]:
    """The values of a case's recipe."""
    small = a.model is None
    source = folder / "rows.jsonl" if small else Path(a.data).resolve()
    values: dict[str, dict[str, Any]] = {
        "model": {"name": str(folder / "small") if small else a.model, "dtype": "bf16" if case.dtype == "bf16" else "fp32"},
        "adapter": {"kind": "lora", "rank": 8, "alpha": 16},
        "data": {
            "train": {"source": str(source), "format": "prompt-completion" if small else "alpaca"}, "seq_len": a.seq,
        },
        "train": {
            "duration": f"{a.steps} steps", "global_batch": f"{a.batch} examples", "micro_batch": f"{2 * a.seq} tokens",
            "learning_rate": 1e-3 if small else 1e-4, "warmup": "2 steps", "clip_norm": a.clip, "compile": case.compile,
        },
        "parallel": {"replicate": case.replicate, "shard": case.shard, "tensor": case.tensor, "experts": case.experts},
        "checkpoint": {"every": None}, "log": {"tensorboard": False},
    }  # fmt: skip
    for section, changes in TRAINED[case.trained].items():
        values[section] = (
            changes if changes.get("kind") == "none" else {**values[section], **changes}
        )
    return values


def use_float64() -> None:
    """Let this process compute in float64 what a recipe calls fp32, which no recipe offers."""
    import torch
    from torch import nn
    from transformers.models.llama import modeling_llama

    from tunesmith.adapter.lora import Lora
    from tunesmith.model.dtypes import DTYPES

    def norm(self: Any, hidden_states: Any) -> Any:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    def rotary(self: Any, x: Any, position_ids: Any) -> Any:
        exponent = (
            torch.arange(0, self.config.head_dim, 2, dtype=torch.float64) / self.config.head_dim
        )
        angles = (
            position_ids[..., None].double()
            * self.config.rope_parameters["rope_theta"] ** -exponent
        )
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()

    def add_lora(self: Lora, *arguments: Any) -> None:
        add(self, *arguments)
        self.lora_A, self.lora_B = (
            nn.Parameter(self.lora_A.double()),
            nn.Parameter(self.lora_B.double()),
        )

    add, Lora.add_lora = Lora.add_lora, add_lora  # type: ignore[method-assign]
    modeling_llama.LlamaRMSNorm.forward = norm  # type: ignore[method-assign]
    modeling_llama.LlamaRotaryEmbedding.forward = rotary
    DTYPES["fp32"] = torch.float64


def rank(folder: Path) -> None:
    """One rank: train each recipe of cases.json; rank 0 adds each curve to curves.jsonl."""
    from tunesmith.config.load import from_mapping
    from tunesmith.training.run import train

    listed = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    if listed["float64"]:
        use_float64()
    for index, (case, values) in enumerate(listed["cases"]):
        out = folder / f"run-{index}"
        result = train(
            from_mapping({**values, "output_dir": str(out)}, where="ranks.py", base=folder),
            quiet=True,
        )
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(out)
            curve = [[record.loss, record.grad_norm] for record in result.records]
            with (folder / "curves.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps([case, curve]) + "\n")


def train_all(
    a: argparse.Namespace, folder: Path, world: int, wanted: list[Case]
) -> Iterator[tuple[Case, Curve, float]]:
    """Train the cases of one number of ranks, in one start of them: each case, its curve and its
    seconds, as they come.
    """
    listed = {
        "float64": a.float64,
        "cases": [(asdict(case), recipe(a, folder, case)) for case in wanted],
    }
    (folder / "cases.json").write_text(json.dumps(listed), encoding="utf-8")
    curves = folder / "curves.jsonl"
    curves.write_text("", encoding="utf-8")
    start = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        if world > 1
        else []
    )
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    env["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    began, seen = time.monotonic(), 0
    with (folder / "stderr").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *start, __file__, "--as-rank", str(folder)],
            stdout=log,
            stderr=log,
            env=env,
        )
        try:
            while True:
                ended = process.poll() is not None
                lines = curves.read_text(encoding="utf-8").splitlines()
                for line in lines[seen:]:
                    case, curve = json.loads(line)
                    yield Case(**case), curve, time.monotonic() - began
                    began = time.monotonic()
                seen = len(lines)
                if ended:
                    break
                time.sleep(0.5)
        finally:
            process.terminate()
            process.wait()
    if process.returncode or seen < len(wanted):
        # Not torchrun's
        said = (
            (folder / "stderr")
            .read_text(errors="replace")
            .partition("torch/distributed/elastic")[0]
        )
        sys.exit(f"{wanted[seen:][:1]} failed:\n{said[-4000:]}")


def differences(one: Curve, many: Curve) -> dict[str, float]:
    """Largest relative differences of loss and gradient norm, in the first step and in all."""
    found = {}
    for index, name in enumerate(("loss", "norm")):
        values = [abs(b[index] / a[index] - 1) for a, b in zip(one, many, strict=True)]
        found |= {f"{name}_first": values[0], f"{name}_all": max(values)}
    return found


def measure(a: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows, those of the file first; the file is written again after each."""
    file = Path(a.json) if a.json else None
    known = (
        json.loads(file.read_text(encoding="utf-8"))
        if file and file.exists()
        else {"rows": [], "curves": []}
    )
    rows, curves = known["rows"], {Case(**case): curve for case, curve in known["curves"]}
    fields = Case.__dataclass_fields__
    done = {Case(**{k: row[k] for k in fields if k in row}) for row in rows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if a.model is None:
            write_small(folder, mixture=a.mixture)
        wanted = [case for case in cases(a, a.name) if case not in done]
        for world in sorted({case.ranks for case in wanted}):
            here = [case for case in wanted if case.ranks == world and case not in curves]
            for case, curve, seconds in train_all(a, folder, world, here) if here else ():
                if case == case.reference or "dropout" in case.trained:
                    curves[case] = curve
                if case != case.reference:
                    found = differences(curves[case.reference], curve)
                    clipped = sum(norm > a.clip for _, norm in curve)
                    rows.append({
                        **asdict(case), "ranks": world, "beside": case.reference.mesh, **found, "steps": len(curve),
                        "clipped": clipped, "loss": [curve[0][0], curve[-1][0]], "seconds": round(seconds, 1),
                    })  # fmt: skip
                    shown = " ".join(f"{key} {found[key]:.1e}" for key in FIGURES)
                    print(f"{case.trained:<18}{case.mesh:<34}{shown}  {seconds:.0f} s", flush=True)
                if file:
                    kept = [(asdict(case), curve) for case, curve in curves.items()]
                    file.write_text(
                        json.dumps(
                            {
                                "command": [Path(word).name for word in sys.argv],
                                "rows": rows,
                                "curves": kept,
                            }
                        )
                        + "\n"
                    )
    return rows


def largest(rows: list[dict[str, Any]]) -> str:
    """The largest difference of the loss in the first step and in all; empty without rows."""
    if not rows:
        return ""
    return " / ".join(f"{max(row[key] for row in rows):.0e}" for key in ("loss_first", "loss_all"))


def tables(files: list[Path]) -> str:
    """The page's table: a row for each kind of mesh, with the largest difference of its rows in the
    JSON files.
    """
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    without_dropout = [row for row in rows if "dropout" not in row["trained"]]
    settings: dict[str, list[dict[str, Any]]] = {}
    for row in without_dropout:
        compiled = ", compiled" if row["compile"] == "on" else ""
        settings.setdefault(f"{row['model']}, {row['dtype']}{compiled}", []).append(row)
    kinds = sorted(
        {kind_of_mesh(row) for row in without_dropout}, key=lambda kind: (kind.count(" x "), kind)
    )
    lines = [["mesh", *settings], ["---"] * (1 + len(settings))]
    for kind in kinds:
        cells = [
            largest([row for row in of_setting if kind_of_mesh(row) == kind])
            for of_setting in settings.values()
        ]
        lines.append([kind, *cells])
    norms = [
        f"{max(max(row['norm_first'], row['norm_all']) for row in of_setting):.0e}"
        for of_setting in settings.values()
    ]
    lines.append(["gradient norm, all meshes", *norms])
    text = "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    clipped, steps = (sum(row[key] for row in without_dropout) for key in ("clipped", "steps"))
    text += f"\nSteps whose gradient was clipped: {clipped:,} of {steps:,}.\n"
    with_dropout = [row for row in rows if "dropout" in row["trained"]]
    if with_dropout:
        one_process = largest([row for row in with_dropout if row["beside"] == "one process"])
        copies = largest([row for row in with_dropout if row["beside"] != "one process"])
        text += (
            f"LoRA with dropout 0.1: {copies} for shards beside the same number of copies, "
            f"{one_process} for copies and tensor\ngroups beside one process.\n"
        )
    return text + "\n"


def kind_of_mesh(row: dict[str, Any]) -> str:
    """The axes of a row's mesh, without their sizes."""
    axes = [axis for axis in ("replicate", "shard", "tensor") if row[axis] > 1]
    kind = " x ".join(axes) or "one process"
    return kind + (", experts over ranks" if row.get("experts", 1) > 1 else "")


def write_page(check: bool, page: Path, files: list[Path]) -> int:
    """Write the tables into the page, or compare them with it; an exit status."""
    old = page.read_text(encoding="utf-8")
    before, _, rest = old.partition(BEGIN)
    new = before + BEGIN + tables(files) + END + rest.partition(END)[2]
    if check and new != old:
        print(
            f"{page} differs from its measurements; run: python benchmarks/parity/losses_on_ranks.py --write {page} ...",
            file=sys.stderr,
        )
        return 1
    if not check:
        page.write_text(new, encoding="utf-8")
    return 0


def main() -> None:
    if sys.argv[1:2] == ["--as-rank"]:
        rank(Path(sys.argv[2]))
        return
    if sys.argv[1:2] in (["--write"], ["--check"]):
        sys.exit(
            write_page(sys.argv[1] == "--check", Path(sys.argv[2]), list(map(Path, sys.argv[3:])))
        )
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--model", help="a Transformers folder or a .gguf file; without it a small Llama is made"
    )
    p.add_argument("--name", default="small Llama", help="of the model, in the table")
    p.add_argument("--data", help="alpaca-like rows, a JSON array")
    p.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    p.add_argument("--trained", nargs="+", default=list(TRAINED), choices=list(TRAINED))
    p.add_argument("--tensor", action="store_true", help="meshes with tensor parallelism too")
    p.add_argument("--mixture", action="store_true", help="LoRA of a small mixture of experts")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--seq", type=int, default=128)
    p.add_argument("--batch", type=int, default=8, help="examples of a step")
    p.add_argument("--clip", type=float, default=0.5, help="train.clip_norm")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    p.add_argument("--float64", action="store_true")
    p.add_argument("--compile", default="off", choices=["on", "off"])
    p.add_argument("--json", help="add the table to this file")
    a = p.parse_args()
    if a.mixture:
        a.name, a.trained = "small mixture", ["LoRA"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # of `timeout`: end the ranks, too
    measure(a)


if __name__ == "__main__":
    main()
