"""Host memory of each rank while it loads a model, resumes, and writes: its growth over what it had
before.

    python benchmarks/tables/host_memory.py --tokenizer DIR --ranks 4 --gib 4 --json out.json
    python benchmarks/tables/host_memory.py --tokenizer DIR --ranks 4 --gib 1 --cases "full, shards, resumed"
    python benchmarks/tables/host_memory.py --tokenizer DIR --ranks 4 --gib 1 --cases "full, shards" --shape llama3-3b
    python benchmarks/tables/host_memory.py --write docs/measurements/ranks.md --json out.json

The checkpoint is random, of a true shape with as many layers as make the size, bf16 in files of 1
GB. The ranks are started by torchrun on this machine, on its CPU with gloo. Counted is the peak of
all resident pages in a phase (VmHWM of /proc/self/status, set back before it), mapped files and
torch's own code included; the page cache is not in it. The bound is what the phase leaves on the
rank (its shard, moments, or scales) and one tensor: the largest one that is read or written, as it
is stored there; an export puts it together from the parts of the ranks, of which one more is in
memory. No step is taken: there are no gradients, and moments only where a checkpoint brings them.
The exit status is 1 if a rank exceeds its bound.

Phases: load; resume, from the optimizer's file of one process; save, a checkpoint within the loop
(of an adapter that ranks share, rank 0's copy is what the phase leaves); final; export, of the
saved checkpoint by rank 0.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

GIB = 2**30
FULL, SHARDS = ["adapter.kind=none"], ["parallel.shard={n}"]
CASES = {
    "full, shards": [*FULL, *SHARDS],
    "full, shards of copies": [*FULL, "parallel.replicate=2", "parallel.shard={half}"],
    "full, shards of tensor groups": [*FULL, "parallel.tensor=2", "parallel.shard={half}"],
    "LoRA, shards": SHARDS,
    "LoRA, copies": ["parallel.replicate={n}"],
    "LoRA on nf4, shards": ["model.quantize=nf4", *SHARDS],
    "LoRA on nf4, shards of tensor groups": [
        "model.quantize=nf4",
        "parallel.tensor=2",
        "parallel.shard={half}",
    ],
    "LoRA on fp8, shards": ["model.quantize=fp8", *SHARDS],
    "full, a tensor group": [*FULL, "parallel.tensor={n}"],
    "LoRA of rank 64, a tensor group": ["adapter.rank=64", "parallel.tensor={n}"],
    "full, shards, resumed": [*FULL, *SHARDS],  # from the checkpoint of one process
}
ON_ASKING = ("full, shards, resumed",)
PHASES = ("load", "resume", "save", "final", "export")


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def rank(folder: Path, case: str, words: list[str]) -> None:
    """One rank: every phase of the case; rank 0 leaves the figures of all in figures.json."""
    import torch

    from tunesmith.build_model import build_model
    from tunesmith.checkpoint import contents, manifest, sharded
    from tunesmith.checkpoint.resume import Progress, Start
    from tunesmith.config.load import load_recipe
    from tunesmith.distributed.ranks import join_ranks
    from tunesmith.distributed.vocab_parallel import local_part
    from tunesmith.hub.model_files import read_model_files
    from tunesmith.model.safetensors_files import read_headers
    from tunesmith.parallel.mesh import Mesh, possible_shapes
    from tunesmith.planning.resolve import inference_plan
    from tunesmith.quant.scaled_matmul import TENSOR_WISE
    from tunesmith.training.build import make_optimizer

    def held(tensors: Any) -> int:
        return sum(
            {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in map(local_part, tensors)
            }.values()
        )

    with join_ranks() as ranks:
        run = load_recipe(folder / "recipe.yaml", words)
        files = read_model_files(folder / "model", run.model)
        stored = max(
            entry.size for entries in read_headers(files.folder).values() for entry in entries
        )
        mesh = Mesh.of(possible_shapes(run.parallel, ranks.world)[0], "cpu")
        plan, own = inference_plan(run, files, torch.device("cpu")), {}
        if run.model.quantize == "fp8":
            plan = replace(plan, base=TENSOR_WISE)

        @contextmanager
        def phase(name: str, largest: int = stored) -> Iterator[dict[str, int]]:
            """Note the peak of a block, and what is left of it; the block says what it `held`."""
            gc.collect()
            ranks.all_gather_object(None)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            before, own[name] = status("VmRSS"), {"held": 0, "largest": largest}
            yield own[name]
            own[name] |= {"peak": status("VmHWM") - before, "after": status("VmRSS") - before}

        with phase("load") as found:
            root, _ = build_model(run, files, plan, mesh=mesh)
            found["held"] = held([*root.parameters(), *root.buffers()])
        full = run.adapter.kind == "none"
        # fp32, as shards, masters and moments are
        wide = max(p.numel() for p in root.parameters()) * 4
        start = Start()
        if case.endswith("resumed"):
            start = Start(
                found=manifest.SavedCheckpoint(folder / "checkpoint-1", 1), progress=Progress()
            )
        if start.checkpoint or (mesh.shape.tensor > 1 and not full):
            with phase("resume", wide) as found:
                optimizer = make_optimizer(run, root, start, ranks)
                for part in optimizer.parts.values() if start.checkpoint is None else ():
                    part.state = {name: value + 1 for name, value in part.initial_state().items()}
                found["held"] = held(
                    t for part in optimizer.parts.values() for t in part.state.values()
                )
            if start.checkpoint is None:
                del own["resume"]
            values = run, root, {}, optimizer.state_dict(), Progress()
            writer = sharded.RanksWriter(folder / "run", 1, None, sync=lambda: None, ranks=ranks)
            with phase("save", wide) as found:
                if full:
                    save = sharded.sharded_save_function(*values, ranks=writer.ranks, copy=False)
                else:
                    save, _ = contents.adapter_save_function(*values, False)
                    if ranks.is_main_process:
                        found["held"] = 3 * sum(p.numel() * 4 for _, p in root.trained_parameters())
                writer.write(
                    save if full or ranks.is_main_process else lambda place: None, 1, keep_step=None
                )
        with phase("final"):
            if ranks.is_main_process:
                with manifest.atomic_folder(folder / "final", 1) as place:
                    contents.write_model_files(place, run, root, {})
            else:
                contents.write_model_files(None, run, root, {})
        if start.checkpoint:
            # DCP reads a part whole, beside the tensor
            with phase("export", wide + wide // mesh.shape.shard):
                if ranks.is_main_process:
                    sharded.export_sharded(
                        folder / "run" / "checkpoint-1", folder / "exported", run
                    )
        every = ranks.all_gather_object(own)
        if ranks.is_main_process:
            found = {"mesh": mesh.shape.describe(), "ranks": every}
            (folder / "figures.json").write_text(json.dumps(found), encoding="utf-8")


def write_inputs(folder: Path, shape: str, gib: float, tokenizer: str) -> None:
    """The model and a recipe."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "speed"))
    from random_model import write_random_model

    from tunesmith.model.shapes import SHAPES
    from tunesmith.model.spec import read_spec

    def parameters(layers: int) -> int:
        return read_spec(
            {**SHAPES[shape].config, "num_hidden_layers": layers}, where=shape
        ).parameters

    layer = parameters(2) - parameters(1)
    layers = max(1, round((gib * GIB / 2 - parameters(1)) / layer) + 1)
    write_random_model(folder / "model", shape, tokenizer, layers, file_size="1GB")
    recipe = {
        "model": {"name": str(folder / "model"), "dtype": "bf16"},
        "data": {"train": {"source": "none.jsonl", "format": "text"}},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")


def write_checkpoint(folder: Path) -> None:
    """checkpoint-1 as one process leaves it: the model's files and the optimizer's, with fp32
    masters and moments.
    """
    import torch

    from tunesmith.build_model import build_model
    from tunesmith.checkpoint import contents
    from tunesmith.config.load import load_recipe
    from tunesmith.hub.model_files import read_model_files
    from tunesmith.optim.optimizer import Optimizer
    from tunesmith.planning.resolve import inference_plan

    run = load_recipe(folder / "recipe.yaml", FULL)
    files = read_model_files(folder / "model", run.model)
    root, _ = build_model(run, files, inference_plan(run, files, torch.device("cpu")))
    optimizer = Optimizer(root.trained_parameters(), run.train)
    for part in optimizer.parts.values():
        part.state = part.initial_state()
    (folder / "checkpoint-1").mkdir()
    contents.write_optimizer(folder / "checkpoint-1", optimizer.state_dict())


def torchrun(count: int, *words: str) -> None:
    """Start `count` ranks of this file; SystemExit with their last lines if they fail."""
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        __file__,
        *words,
    ]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=env, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def measured(folder: Path, case: str, count: int) -> list[dict[str, Any]]:
    """A row for each phase of a case, with the figures of every rank in MiB."""
    words = [word.format(n=count, half=count // 2) for word in CASES[case]]
    torchrun(count, "--as-rank", str(folder), case, *words)
    found, rows = json.loads((folder / "figures.json").read_text(encoding="utf-8")), []
    for phase in (name for name in PHASES if name in found["ranks"][0]):
        ranks = [own[phase] for own in found["ranks"]]
        row = {"case": case, "mesh": found["mesh"], "phase": phase}
        row |= {
            f"{name}_mib": [round(own[name] / 2**20) for own in ranks]
            for name in ("peak", "after", "held")
        }
        row["largest_tensor_mib"] = round(ranks[0]["largest"] / 2**20)
        row["bound_mib"] = [round((own["held"] + own["largest"]) / 2**20) for own in ranks]
        rows.append(
            {**row, "within": all(own["peak"] <= own["held"] + own["largest"] for own in ranks)}
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A row for each case in Markdown: `peak / bound` of each phase, both of the rank where they
    are largest.
    """
    cases: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        mesh = " x ".join(axis for axis in row["mesh"].split(" x ") if not axis.endswith(" 1"))
        case = (f"{row['shape']}, {row['gib']} GiB", row["case"], mesh)
        exceeded = "" if row["within"] else ", exceeded"
        figures = f"{max(row['peak_mib']):,} / {max(row['bound_mib']):,}{exceeded}"
        cases.setdefault(case, {})[row["phase"]] = figures
    lines = [
        f"| checkpoint in bf16 | case | mesh | {' | '.join(PHASES)} |",
        "|---" * (3 + len(PHASES)) + "|",
    ]
    for case, phases in cases.items():
        lines.append(f"| {' | '.join((*case, *(phases.get(phase, '') for phase in PHASES)))} |")
    return "\n".join(lines)


def write_table(page: Path, rows: list[dict[str, Any]]) -> None:
    """Put the table between the marks of a page."""
    begin, end = "<!-- host memory -->\n", "<!-- /host memory -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(f"{before}{begin}{table(rows)}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def main() -> None:
    if sys.argv[1:2] == ["--as-rank"]:
        rank(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
        return
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--tokenizer", help="a folder or Hub id")
    p.add_argument("--ranks", type=int, default=4)
    p.add_argument("--gib", type=float, default=4.0, help="of the checkpoint's weights")
    p.add_argument("--shape", default="mistral-7b")
    p.add_argument(
        "--cases", nargs="+", choices=list(CASES), default=[c for c in CASES if c not in ON_ASKING]
    )
    p.add_argument(
        "--folder", type=Path, help="make the checkpoint here, or take it from here, and keep it"
    )
    p.add_argument("--json", type=Path, help="add the table to this file, case by case")
    p.add_argument(
        "--write", type=Path, help="measure nothing, and put the table of --json into this page"
    )
    a = p.parse_args()
    old = (
        json.loads(a.json.read_text(encoding="utf-8"))["rows"] if a.json and a.json.exists() else []
    )
    if a.write:
        write_table(a.write, old)
        return
    within = True
    with tempfile.TemporaryDirectory() as name:
        folder = a.folder or Path(name)
        if not (folder / "recipe.yaml").exists():
            write_inputs(folder, a.shape, a.gib, a.tokenizer)
        if (
            any(case.endswith("resumed") for case in a.cases)
            and not (folder / "checkpoint-1").exists()
        ):
            write_checkpoint(folder)
        gib = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors")) / GIB
        print(f"{a.shape}, {gib:.2f} GiB in bf16; largest of {a.ranks} ranks, MiB")
        print(f"{'case':<38}{'phase':<9}{'peak':>7}{'held':>7}{'bound':>7}", flush=True)
        for case in a.cases:
            rows = [
                {"gib": round(gib, 2), "shape": a.shape, **row}
                for row in measured(folder, case, a.ranks)
            ]
            for row in rows:
                figures = "".join(
                    f"{max(row[key]):>7}" for key in ("peak_mib", "held_mib", "bound_mib")
                )
                print(
                    f"{case:<38}{row['phase']:<9}{figures}{'' if row['within'] else '  EXCEEDED'}",
                    flush=True,
                )
                within &= row["within"]
            old = [row for row in old if (row["case"], row["shape"]) != (case, a.shape)] + rows
            if a.json:
                command = [Path(word).name for word in sys.argv]
                a.json.write_text(
                    json.dumps({"command": command, "rows": old}, indent=1) + "\n", encoding="utf-8"
                )
    sys.exit(not within)


if __name__ == "__main__":
    main()
