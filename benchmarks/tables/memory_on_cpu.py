"""The memory estimate beside what training takes on a CPU: growth of the resident memory in two
steps.

    python benchmarks/tables/memory_on_cpu.py --model SMOLLM2_FP32 --data rows.json --json docs/measurements/memory-on-cpu.json
    python benchmarks/tables/memory_on_cpu.py --write docs/measurements/README.md  # the table, from that file

Each case runs in a process of its own: two steps on the first rows of the file (alpaca-like JSON),
several micro batches each, by the trainer's own loop. The estimate is the one that `train` plans
with. Counted from before the model is built, when tokens are there: the peak of all resident pages
(VmHWM of /proc/self/status) less those of files (RssFile), which are code. `tensors` is what torch
had allocated of it at its peak, from its profiler in a second run: the allocator adds the rest.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from generated import table, write_or_check
from host_memory import status

GIB = 2**30
RECORD = Path("docs/measurements/memory-on-cpu.json")
LORA, FULL = ["adapter.rank=8", "adapter.alpha=16"], ["adapter.kind=none"]
PACKED, PADDED = (
    ["train.micro_batch=512 tokens"],
    ["data.pack=false", "train.micro_batch=4 examples"],
)
CASES = {
    "LoRA, packed": [*LORA, *PACKED],
    "LoRA, padded": [*LORA, *PADDED],
    "LoRA, packed, all layers recomputed": [*LORA, *PACKED, "train.recompute=full"],
    "full, packed": [*FULL, *PACKED],
    "full, padded": [*FULL, *PADDED],
}


def measure(
    case: str, model: str, data: str, rows: int, folder: Path, *, profiled: bool
) -> dict[str, Any]:
    """Figures of one case, in bytes; `profiled`: what torch allocated, in place of what is
    resident.
    """
    import numpy as np
    import torch
    from torch.profiler import ProfilerActivity, profile

    from tunesmith.build_model import build_model
    from tunesmith.checkpoint.resume import Start
    from tunesmith.config.load import load_recipe
    from tunesmith.data.prepare import prepare_data
    from tunesmith.distributed.ranks import ONE_PROCESS
    from tunesmith.host.chips import Peak
    from tunesmith.host.signals import StopRequest
    from tunesmith.hub.model_files import read_model_files
    from tunesmith.metrics.sink import Sinks
    from tunesmith.model.tokenizer import eos_ids
    from tunesmith.training.build import Session, make_optimizer, plan_model
    from tunesmith.training.stop_control import StopControl
    from tunesmith.training.trainer import Trainer

    (folder / "run").mkdir()
    kept = json.loads(Path(data).read_text(encoding="utf-8"))[:rows]
    (folder / "rows.json").write_text(json.dumps(kept), encoding="utf-8")
    recipe = {
        "model": {"name": model, "dtype": "fp32"},
        "data": {"train": {"source": str(folder / "rows.json"), "format": "alpaca"}, "seq_len": 512, "train_on": "all"},
        "train": {"duration": "2 steps", "global_batch": f"{rows // 2} examples"},
        "log": {"tensorboard": False}, "output_dir": str(folder / "run"),
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    run, start, device = (
        load_recipe(folder / "recipe.yaml", CASES[case]),
        Start(),
        torch.device("cpu"),
    )
    files = read_model_files(Path(model), run.model)
    found = prepare_data(
        run, files.tokenizer, eos_ids(files.folder, files.tokenizer), files.vocab_rows
    )
    meta, plan = plan_model(run, start, files, found, device, ONE_PROCESS)
    torch.ones(8, 8) @ torch.ones(8, 8)  # starts the threads
    micro: list[int] = []
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak back
    began, of_files = status("VmRSS"), status("RssFile")
    recorder = (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        if profiled
        else nullcontext()
    )
    with recorder:
        root, plan = build_model(run, files, plan, model=meta)
        optimizer = make_optimizer(run, root, start, ONE_PROCESS)
        hashes: dict[str, Any] = {}
        session = Session(run, files, found, root, optimizer, plan, 2, hashes, Peak(None, ""))
        root.train()
        trainer = Trainer(session, start, Sinks([]), StopControl(StopRequest(), folder / "run"))
        with session.loader(0) as loader:
            for batch in loader:
                micro += [part.input_ids.numel() for part in batch.micro]
                trainer.train_step(batch)
    resident = status("VmHWM") - status("RssFile") - (began - of_files)
    if profiled:
        events = [e for e in recorder.profiler.kineto_results.events() if e.name() == "[memory]"]
        resident = int(
            np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max()
        )
    return {
        "tokens": plan.memory.tokens, "micro_batches": micro, "estimate": plan.memory.total - plan.memory.copies,
        "tensors" if profiled else "resident": resident,
        "parts": {name: value for name, value in vars(plan.memory).items() if name not in ("free", "tokens")},
    }  # fmt: skip


def measure_all(model: str, data: str, rows: int, cases: list[str]) -> dict[str, dict[str, Any]]:
    """Each case in a fresh process, once for each figure."""
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        for profiled in ("", "--profiled"):
            words = [
                "--case",
                case,
                "--model",
                model,
                "--data",
                data,
                "--rows",
                str(rows),
                *filter(None, [profiled]),
            ]
            done = subprocess.run(
                [sys.executable, __file__, *words], capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(f"{case} failed:\n{done.stderr[-4000:]}")
            found[case] = found.get(case, {}) | json.loads(done.stdout.splitlines()[-1])
        print(case, json.dumps(found[case]), flush=True)
    return found


def page() -> str:
    """The table in Markdown."""
    head = (
        "SmolLM2-135M, fp32",
        "largest micro batch, tokens",
        "estimate, GiB",
        "allocated",
        "",
        "resident",
        "",
    )
    rows = []
    for case, found in json.loads(RECORD.read_text(encoding="utf-8"))["cases"].items():
        errors = [f"{found['estimate'] / found[name] - 1:+.1%}" for name in ("tensors", "resident")]
        figures = [f"{found[name] / GIB:.3f}" for name in ("estimate", "tensors", "resident")]
        rows.append(
            (
                case,
                f"{max(found['micro_batches']):,}",
                *figures[:2],
                errors[0],
                figures[2],
                errors[1],
            )
        )
    return table(head, rows)


def main() -> None:
    if sys.argv[1:2] in (["--write"], ["--check"]):
        sys.exit(write_or_check(__doc__, "benchmarks/tables/memory_on_cpu.py", page))
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="a Transformers folder in fp32")
    p.add_argument("--data", required=True, help="a JSON array of alpaca rows")
    p.add_argument("--rows", type=int, default=16, help="of the file, half of them in each step")
    p.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    p.add_argument("--json", type=Path, help="add the cases to this file")
    p.add_argument("--case", help=argparse.SUPPRESS)
    p.add_argument("--profiled", action="store_true", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.case:
        with tempfile.TemporaryDirectory() as name:
            print(
                json.dumps(
                    measure(a.case, a.model, a.data, a.rows, Path(name), profiled=a.profiled)
                )
            )
        return
    found = measure_all(a.model, a.data, a.rows, a.cases)
    if a.json:
        old = json.loads(a.json.read_text(encoding="utf-8"))["cases"] if a.json.exists() else {}
        a.json.write_text(
            json.dumps({"rows": a.rows, "cases": old | found}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
