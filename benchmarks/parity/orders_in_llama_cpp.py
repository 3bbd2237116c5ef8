"""The demo's run in Ollama's folder: are its held-out orders answered in llama.cpp as by `generate`?

    python benchmarks/parity/orders_in_llama_cpp.py --dir /tmp/orders --json docs/measurements/orders-in-llama-cpp.json

Runs as a user does: `train demo/recipe.yaml` and `generate` on the held-out rows (both left out
where their result is there), `export --to ollama` in each of QUANTS. The folder's Modelfile is read by Ollama's
grammar. Its file is opened in llama.cpp with its context, the messages go through the template in the
file, and an answer ends at the Modelfile's stops: all that Ollama's server, which no package has, would
pass on. An answer that does not end there is an error. It ends with 1 where an f16 file answers a row
otherwise than `generate`; how near a quantized file comes is printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import task
from run import dtype_for_this_machine, find_model

from export.modelfile import read_modelfile
from tunesmith.export.gguf.llama_cpp import LlamaCpp

ROOT = Path(__file__).resolve().parents[2]
QUANTS = ("f16", "q4_k_m")
TOKENS = 64  # of an answer at most


def tunesmith(*words: object) -> str:
    command = [sys.executable, "-m", "tunesmith", *map(str, words)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def train(folder: Path, rows: Path, held_out: Path) -> Path:
    """The demo's run, with its rows in the folder."""
    run = folder / "run"
    if not (run / "final").is_dir():
        recipe = ROOT / "demo" / "recipe.yaml"
        keys = {
            "model.name": find_model(),
            "data.train.source": rows,
            "data.train.format": "messages",
            "data.validation.source": held_out,
            "data.validation.format": "messages",
            "output_dir": run,
        }
        overrides = [f"{key}={value}" for key, value in keys.items()]
        tunesmith("train", recipe, *overrides, *dtype_for_this_machine())
    return run


def generate(run: Path, held_out: Path, answers: Path) -> list[str]:
    """What `tunesmith generate` answers, greedily."""
    if not answers.exists():
        options = ("--max-new-tokens", TOKENS, "--batch-size", 1)
        tunesmith("generate", run, "--input", held_out, "--output", answers, *options)
    lines = answers.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["output"].strip() for line in lines]


def serve(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """What llama.cpp answers with the file and the parameters of a Modelfile."""
    commands = read_modelfile((folder / "Modelfile").read_text(encoding="utf-8"))
    values = dict(commands)
    # SmolLM2 ends answers with eos, which is in the file: no stop is needed.
    assert {"from", "num_ctx"} <= values.keys() <= {"from", "num_ctx", "stop"}, commands
    stops = [value for name, value in commands if name == "stop"]
    answers = []
    file = folder / values["from"]
    with LlamaCpp(file, threads=1, context=int(values["num_ctx"])) as server:
        for row in rows:
            # The last message is the answer that is wanted.
            request = {"messages": row["messages"][:-1]}
            prompt = server.post("/apply-template", request)["prompt"]
            body = {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "stop": stops}
            answer = server.post("/completion", body)
            assert answer["stop_type"] in ("eos", "word"), answer["stop_type"]
            answers.append(answer["content"].strip())
    return answers


def score(answers: list[str], generated: list[str], wanted: list[str]) -> dict[str, int]:
    """Answers that are right, that are `generate`'s, and single fields that are right."""
    fields = 0
    for answer, right in zip(answers, wanted, strict=True):
        fields += len(set(right.split(" | ")) & set(answer.split(" | ")))
    return {
        "right": sum(map(str.__eq__, answers, wanted)),
        "as_generate": sum(map(str.__eq__, answers, generated)),
        "fields_right": fields,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--dir", type=Path, required=True, help="where the run and files are written"
    )
    parser.add_argument("--json", type=Path, help="where the result is written")
    options = parser.parse_args()
    folder = options.dir.resolve()
    train_rows, held_out = task.write(folder / "data")
    run = train(folder, train_rows, held_out)
    rows = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    wanted = [row["messages"][-1]["content"] for row in rows]
    generated = generate(run, held_out, folder / "generated.jsonl")
    report: dict[str, Any] = {
        "command": "python benchmarks/parity/orders_in_llama_cpp.py --dir DIR",
        "rows": len(rows),
        "fields": sum(len(text.split(" | ")) for text in wanted),
        "generate": score(generated, generated, wanted),
    }
    print("generate", report["generate"], flush=True)
    for quant in QUANTS:
        output = folder / f"orders-{quant}"
        words = ("export", run, "--to", "ollama", "--quant", quant, "--threads", 1)
        exported = json.loads(tunesmith(*words, "--output", output, "--force", "--json"))
        start = time.monotonic()
        answers = serve(output, rows)
        check = exported["check"]
        report[quant] = {
            **score(answers, generated, wanted),
            "mb": round(exported["bytes"] / 1e6, 1),
            "mean_kl": float(f"{check['tuned']['mean_kl']:.2g}"),
            "same_top": check["tuned"]["agreement"],
            "seconds": round(time.monotonic() - start, 1),
        }
        print(quant, report[quant], flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(report["f16"]["as_generate"] != len(rows))


if __name__ == "__main__":
    sys.exit(main())
