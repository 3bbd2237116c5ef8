"""Run directories written by hand, with chosen curves, recipe and end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recipes import merge
from records import RUN, record
from tunesmith.config.dump import to_mapping, to_yaml
from tunesmith.tools.report.run_files import RunFiles

ENV = {
    "python": "3.12.1", "tunesmith": "0.1.0", "torch": "2.13.0+cpu", "cpu": "a processor", "cpu_threads": 2, "gpus": [],
    "commit": "0123abcd+", "command": ["/usr/bin/tunesmith", "train", "my recipe.yaml"], "recipe_hash": "r" * 64,
    "model_hash": "m" * 64, "data_hash": "d" * 64, "validation_hash": "v" * 64, "choices": {"compile": {"taken": "off"}},
}  # fmt: skip


def write_run(
    folder: Path,
    val: dict[int, float] | None = None,
    *,
    steps: int = 40,
    recipe: dict[str, Any] | None = None,
    env: dict[str, Any] | None = None,
    finished: bool = True,
    samples: list[tuple[int, str, str]] = (),  # type: ignore[assignment]
    **changed: Any,
) -> RunFiles:
    """A run with val_loss at the steps of `val`; `changed`: values of records, or functions of the step."""
    folder.mkdir(parents=True)
    values = merge(to_mapping(RUN) | {"output_dir": str(folder)}, recipe or {})
    (folder / "config.yaml").write_text(to_yaml(values), encoding="utf-8")
    (folder / "env.json").write_text(json.dumps(ENV | (env or {})))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            given = {name: v(step) if callable(v) else v for name, v in changed.items()}
            file.write(record(step, val_loss=(val or {}).get(step), **given).to_json() + "\n")
    rows = [dict(zip(("step", "prompt", "answer"), sample, strict=True)) for sample in samples]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if finished:
        (folder / "final").mkdir()
        (folder / "final" / "manifest.json").write_text(json.dumps({"step": steps, "files": {}}))
    return RunFiles(folder)


def falling(start: float, *, jitter: float = 0.01, steps: int = 40) -> dict[int, float]:
    """val_loss every 4 steps, falling by 0.1 each time, `jitter` above and below that line."""
    every = range(4, steps + 1, 4)
    return {step: start - step / 40 + jitter * (-1) ** (step // 4) for step in every}


def write_eval(run: Path, values: Any, name: str = "held") -> Path:
    folder = run / "evals"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.scores.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def row_eval(losses: list[float], row_hash: str = "l" * 64, **changes: Any) -> dict[str, Any]:
    """What `eval` writes of rows of one token each, by the loss of each."""
    return {
        "tunesmith": "eval scores", "data": "held.jsonl", "rows": len(losses), "row_hash": row_hash, "step": 40,
        "losses": {"tuned": sum(losses) / len(losses)}, "scores": {},
        "row_losses": {"row_hash": row_hash, "tokens": [1] * len(losses), "tuned": losses}, **changes,
    }  # fmt: skip


def eval_scores(**changes: Any) -> dict[str, Any]:
    """What `eval --score` writes, with the score `exact` of two models."""
    exact = {
        "base": [0.5, 0.4, 0.6], "tuned": [0.62, 0.521, 0.713], "difference": [0.12, 0.04, 0.201],
        "verdict": "exact: tuned is better", "by_row": {"base": [0, 1], "tuned": [1, 1]},
    }  # fmt: skip
    return {
        "tunesmith": "eval scores", "data": "held.jsonl", "rows": 100, "row_hash": "a" * 64, "step": 40,
        "losses": {"base": 2.5, "tuned": 2.25}, "scores": {"exact": exact}, **changes,
    }  # fmt: skip
