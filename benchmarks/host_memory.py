"""Host memory of each rank while it loads a model, resumes, and writes final/: its growth over what it had before.

    python benchmarks/host_memory.py --tokenizer DIR --ranks 4 --gib 4 --json out.json
    python benchmarks/host_memory.py --tokenizer DIR --ranks 4 --gib 0.5 --cases "full, shards, resumed"

The checkpoint is random, of a true shape with as many layers as make the size, bf16 in files of 1 GB. The ranks are started
by torchrun on this machine, on its CPU with gloo. Counted is the peak of all resident pages in a phase (VmHWM of
/proc/self/status, set back before it), mapped files and torch's own code included; the page cache is not in it. The bound is
what the phase leaves on the rank (its shard, or moments) and one tensor: the largest one of the checkpoint, as it is stored
there. No step is taken: there are no gradients, and moments only where a checkpoint brings them. The exit status is 1 if a
rank exceeds its bound.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
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
    "full, shards, resumed": [*FULL, *SHARDS],  # from the checkpoint of one process
}
ON_ASKING = ("full, shards, resumed",)


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def start_phase() -> int:
    """Set the peak back; returns the resident bytes now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status("VmRSS")


def rank(folder: Path, case: str, words: list[str]) -> None:
    """One rank: load, resume if asked, write final/; rank 0 leaves the figures of all in figures.json."""
    import torch

    from tunesmith.build_model import build_model
    from tunesmith.checkpoint import export, state
    from tunesmith.checkpoint.resume import Progress, Start
    from tunesmith.config.load import load_recipe
    from tunesmith.hub.model_files import read_model_files
    from tunesmith.model.safetensors_files import read_headers
    from tunesmith.parallel.mesh import Mesh, possible_shapes
    from tunesmith.ranks import join_ranks
    from tunesmith.runtime.resolve import inference_plan
    from tunesmith.sharded import local_part
    from tunesmith.training.build import make_optimizer

    def held(tensors: Any) -> int:
        return sum(
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in map(local_part, tensors)}.values()
        )

    with join_ranks() as ranks:
        run = load_recipe(folder / "recipe.yaml", words)
        files = read_model_files(folder / "model", run.model)
        stored = max(entry.size for entries in read_headers(files.folder).values() for entry in entries)
        mesh = Mesh.of(possible_shapes(run.parallel, ranks.world)[0], "cpu")
        plan, own = inference_plan(run, files, torch.device("cpu")), {}
        ranks.gather(None)

        before = start_phase()
        root, _ = build_model(run, files, plan, mesh=mesh)
        end = "VmHWM", "VmRSS"
        own["load"] = [status(key) - before for key in end]
        own["shard"] = held([*root.parameters(), *root.buffers()])
        if case.endswith("resumed"):
            saved = folder / "checkpoint-1"
            start = Start(found=state.SavedCheckpoint(saved, 1), progress=Progress())
            ranks.gather(None)
            before = start_phase()
            optimizer = make_optimizer(run, root, start, ranks)
            own["resume"] = [status(key) - before for key in end]
            own["moments"] = held(optimizer.state_dict().values())
        ranks.gather(None)
        before = start_phase()
        if ranks.leads:
            with state.writing(folder / "final", 1) as place:
                export.write_model_files(place, run, root, {})
        else:
            export.write_model_files(None, run, root, {})
        own["final"] = [status(key) - before for key in end]
        every = ranks.gather(own)
        if ranks.leads:
            found = {"largest_tensor": stored, "mesh": mesh.shape.describe(), "ranks": every}
            (folder / "figures.json").write_text(json.dumps(found), encoding="utf-8")


def write_inputs(folder: Path, shape: str, gib: float, tokenizer: str) -> None:
    """The model and a recipe."""
    from random_model import write_random_model

    from tunesmith.model.shapes import SHAPES
    from tunesmith.model.spec import read_spec

    def parameters(layers: int) -> int:
        return read_spec({**SHAPES[shape].config, "num_hidden_layers": layers}, where=shape).parameters

    layer = parameters(2) - parameters(1)
    layers = max(1, round((gib * GIB / 2 - parameters(1)) / layer) + 1)
    write_random_model(folder / "model", shape, tokenizer, layers, file_size="1GB")
    recipe = {
        "model": {"name": str(folder / "model")},
        "data": {"train": {"source": "none.jsonl", "format": "text"}},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")


def write_checkpoint(folder: Path) -> None:
    """checkpoint-1 as one process leaves it: the model's files and the optimizer's, with fp32 masters and moments."""
    import torch

    from tunesmith.build_model import build_model
    from tunesmith.checkpoint import export
    from tunesmith.config.load import load_recipe
    from tunesmith.hub.model_files import read_model_files
    from tunesmith.optim.optimizer import Optimizer
    from tunesmith.runtime.resolve import inference_plan

    run = load_recipe(folder / "recipe.yaml", FULL)
    files = read_model_files(folder / "model", run.model)
    root, _ = build_model(run, files, inference_plan(run, files, torch.device("cpu")))
    optimizer = Optimizer(root.trained_parameters(), run.train)
    for part in optimizer.parts.values():
        part.state = part.initial_state()
    (folder / "checkpoint-1").mkdir()
    export.write_optimizer(folder / "checkpoint-1", optimizer.state_dict())


def torchrun(count: int, *words: str) -> None:
    """Start `count` ranks of this file; SystemExit with their last lines if they fail."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), __file__, *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def measured(folder: Path, case: str, count: int) -> list[dict[str, Any]]:
    """A row for each phase of a case: the rank with the least room below its bound, and the most of all."""
    words = [word.format(n=count, half=count // 2) for word in CASES[case]]
    torchrun(count, "--as-rank", str(folder), case, *words)
    found = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    rows = []
    for phase, holds in (("load", "shard"), ("resume", "moments"), ("final", "")):
        ranks = [own for own in found["ranks"] if phase in own]
        if not ranks:
            continue
        bounds = [own.get(holds, 0) + found["largest_tensor"] for own in ranks]
        peaks = [own[phase][0] for own in ranks]
        rows.append({
            "case": case, "mesh": found["mesh"], "phase": phase, "peak_mib": [round(p / 2**20) for p in peaks],
            "after_mib": [round(own[phase][1] / 2**20) for own in ranks],
            "held_mib": [round(own.get(holds, 0) / 2**20) for own in ranks],
            "bound_mib": [round(b / 2**20) for b in bounds],
            "within": all(p <= b for p, b in zip(peaks, bounds, strict=True)),
        })  # fmt: skip
    rows[0]["largest_tensor_mib"] = round(found["largest_tensor"] / 2**20)
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--as-rank"]:
        rank(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
        return
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokenizer", required=True, help="a folder or Hub id")
    p.add_argument("--ranks", type=int, default=4)
    p.add_argument("--gib", type=float, default=4.0, help="of the checkpoint's weights")
    p.add_argument("--shape", default="mistral-7b")
    p.add_argument("--cases", nargs="+", choices=list(CASES), default=[c for c in CASES if c not in ON_ASKING])
    p.add_argument("--folder", type=Path, help="make the checkpoint here, or take it from here, and keep it")
    p.add_argument("--json", type=Path, help="add the table to this file, case by case")
    a = p.parse_args()
    within = True
    with tempfile.TemporaryDirectory() as name:
        folder = a.folder or Path(name)
        if not (folder / "recipe.yaml").exists():
            write_inputs(folder, a.shape, a.gib, a.tokenizer)
        if any(case.endswith("resumed") for case in a.cases) and not (folder / "checkpoint-1").exists():
            write_checkpoint(folder)
        gib = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors")) / GIB
        print(f"{a.shape}, {gib:.2f} GiB in bf16; largest of {a.ranks} ranks, MiB")
        print(f"{'case':<32}{'phase':<8}{'peak':>7}{'held':>7}{'bound':>7}", flush=True)
        for case in a.cases:
            rows = [{"gib": round(gib, 2), "shape": a.shape, **row} for row in measured(folder, case, a.ranks)]
            for row in rows:
                figures = "".join(f"{max(row[key]):>7}" for key in ("peak_mib", "held_mib", "bound_mib"))
                print(f"{case:<32}{row['phase']:<8}{figures}{'' if row['within'] else '  EXCEEDED'}", flush=True)
                within &= row["within"]
            if a.json:
                old = json.loads(a.json.read_text(encoding="utf-8"))["rows"] if a.json.exists() else []
                kept = [row for row in old if row["case"] != case]
                a.json.write_text(
                    json.dumps({"command": [Path(word).name for word in sys.argv], "rows": kept + rows}, indent=1)
                    + "\n",
                    encoding="utf-8",
                )
    sys.exit(not within)


if __name__ == "__main__":
    main()
