"""CPU seconds until the error of a newcomer's 24 most common mistakes, and the fix tried out.

    python benchmarks/faults/mistakes.py --source ../before/src src --json both.json
    python benchmarks/faults/mistakes.py --only hold_out

Every command is a new process with one thread and no network. It uses the demo model, filled caches
and its own copy of a folder with rows, a recipe and a finished run.

The first part of a fix that can be copied (a command, an option or key=value, or the name behind
"did you mean") is applied, and the command is run again. Its outcome is "works", "same error", or
the first line of another error. The output is a Markdown table. `--json` writes it to a file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

from tunesmith.host.demo_model import demo_model

COMMAND = """
import sys
from tunesmith.cli.main import main
code = main(sys.argv[1:])
print("torch" in sys.modules, file=sys.stderr)
sys.exit(code)
"""
PROGRAM = """
import json, sys, tunesmith
code = 0
try:
    tunesmith.train(rows=[json.loads(line) for line in open("unclear.jsonl")], {arguments})
except tunesmith.TunesmithError as error:
    print(error.text(), file=sys.stderr)
    code = error.exit_code
print("torch" in sys.modules, file=sys.stderr)
sys.exit(code)
"""
RECIPE = """
model: {{name: {model}}}
data:
  {{seq_len: 256, hold_out: 10 examples, train: {{source: faq.jsonl, format: prompt-completion}}}}
train: {{duration: 1 steps, global_batch: 4 examples}}
log: {{samples: 0, tensorboard: false}}
output_dir: runs/new
"""
PYTHON = "train()"
ALL = ("train", "data", "plan")
SHORT = ("train.duration=1 steps", "log.samples=0", "log.tensorboard=false")
MAX_SECONDS = 60  # CPU seconds of a command, because a command with a fix can train for minutes


@dataclass(frozen=True)
class Mistake:
    """A mistake in the words behind a command, or in the recipe."""

    name: str
    words: str
    commands: tuple[str, ...] = ALL
    wrong: str = ""  # the word that the name behind "did you mean" replaces
    right: str = ""  # the text of the recipe that `wrong` replaces

    def split_words(self) -> list[str]:
        words = shlex.split(self.words)
        if "--data" in words:
            words += SHORT if "--model" in words else ("--model", "demo", *SHORT)
        return words


MISTAKES = (
    Mistake("--data: no such file", "--data fqa.jsonl", wrong="fqa.jsonl"),
    Mistake("recipe: no such data file", "recipe.yaml", wrong="rows/faq.jsonl", right="faq.jsonl"),
    Mistake("recipe: no such column", "recipe.yaml 'data.train.columns={prompt: question}'"),
    Mistake("--data: no column name tells the format", "--data unclear.jsonl"),
    Mistake("--data: line 17 is not JSON", "--data broken.jsonl"),
    Mistake("recipe: line 17 is not JSON", "recipe.yaml", wrong="broken.jsonl", right="faq.jsonl"),
    Mistake("misspelled key", "recipe.yaml train.learnin_rate=1e-4", wrong="train.learnin_rate"),
    Mistake("value of the wrong type", "recipe.yaml train.weight_decay=much", wrong="much"),
    Mistake("model path to nothing", "--data faq.jsonl --model ./models/llama", wrong="./models/llama"),
    Mistake("Hub id with a typo, offline", "--data faq.jsonl --model Qwen/Qwen3-0.6", wrong="Qwen/Qwen3-0.6"),
    Mistake("model folder without tokenizer", "--data faq.jsonl --model bare"),
    Mistake("output_dir has another run", "recipe.yaml output_dir=runs/first train.seed=7", ("train",)),
    Mistake("recipe file of that name differs", "--data faq.jsonl train.seed=7", ("train",)),
    Mistake("template file is missing", "recipe.yaml data.template=chat.jinja", wrong="chat.jinja"),
    Mistake("rows are not for dpo", "recipe.yaml method=dpo", wrong="dpo"),
    Mistake("seq_len above the model's", "recipe.yaml data.seq_len=16384"),
    Mistake("answers cut at seq_len", "recipe.yaml data.seq_len=48"),
    Mistake("hold_out leaves no row", "recipe.yaml data.hold_out='60 examples'"),
    Mistake("adapter.target names no layer", "recipe.yaml adapter.target=query_proj", wrong="query_proj"),
    Mistake("fp16 on a CPU", "recipe.yaml model.dtype=fp16"),
    Mistake("tracker is not installed", "recipe.yaml log.wandb=true", ("train",)),
    Mistake("adapter.from is missing", "recipe.yaml adapter.from=runs/frist", wrong="runs/frist"),
    Mistake("unknown machine", "recipe.yaml --on 8xh10", ("plan",), wrong="h10"),
    Mistake("Python: no column name tells the format", "'model=\"demo\"'", (PYTHON,)),
)  # fmt: skip

# Parts of a fix that can be copied. A value in capitals, such as FILE, is a placeholder.
VALUE = (
    r"""(?!["']?[A-Z]+\b)(?:"[^"]*"|'[^']*'|\{(?:[^{}]|\{[^{}]*\})*\}|\[[^]]*\]|[^\s;`,()'\"]+)"""
)
COPIED = re.compile(
    rf"(?<=`)(?P<command>tunesmith [^`]+)(?=`)|(?<=did you mean )(?P<name>[^?]+)(?=\?)"
    rf"|(?P<option>--[a-z-]+) (?P<value>{VALUE}(?:,[\w.=-]+)*)"
    rf"|\b(?P<key>[a-z]+\.[a-z_.]+|output_dir|method|overrides)(?:=|: )(?P<set>{VALUE})|--fresh"
)


class Bench:
    """Inputs for the commands of a checkout: rows, a recipe and a finished run."""

    def __init__(self, folder: Path, source: str, cache: Path) -> None:
        self.env = os.environ | {"PYTHONPATH": str(Path(source).resolve()), "HF_HUB_OFFLINE": "1"}
        self.env |= {"TUNESMITH_CACHE": str(cache), "HF_HOME": str(cache), "OMP_NUM_THREADS": "1"}
        self.work = folder / "work"
        self.work.mkdir(parents=True)
        row = {"prompt": "What is NUMBER plus NUMBER?", "completion": "It is twice NUMBER. " * 4}
        lines = [json.dumps(row).replace("NUMBER", str(i)) + "\n" for i in range(60)]
        (self.work / "faq.jsonl").write_text("".join(lines))
        lines[16] = '{"prompt": "What\n'
        (self.work / "broken.jsonl").write_text("".join(lines))
        (self.work / "unclear.jsonl").write_text('{"q": "What is it?", "b": "A test."}\n' * 60)
        (self.work / "recipe.yaml").write_text(RECIPE.format(model=demo_model()))
        for words in ("--data faq.jsonl", "recipe.yaml output_dir=runs/first"):
            if self.run("train", Mistake("", words).split_words(), limit=600)["exit_code"]:
                raise SystemExit((self.work / "output.log").read_text())
        # The recipe of a run without the run, and the model without its tokenizer
        shutil.rmtree(self.work / "runs" / "faq-demo")
        (self.work / "bare").mkdir()
        for name in ("config.json", "model.safetensors"):
            (self.work / "bare" / name).symlink_to(next(cache.glob(f"models/*/{name}")))
        self.template = self.work.rename(folder / "template")

    def renew(self, old: str, new: str) -> None:
        """Make a new copy of the inputs, and replace a text of the recipe."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.template, self.work, symlinks=True)
        recipe = self.work / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(old or "\0", new))

    def run(self, command: str, words: list[str], limit: int = MAX_SECONDS) -> dict[str, Any]:
        """Run a command in a new process. Return its costs, its exit code, and its error."""
        code = PROGRAM.format(arguments=", ".join(words)) if command == PYTHON else COMMAND
        program = [sys.executable, "-c", code, command, *words]
        log = self.work / "output.log"
        with log.open("w") as out:
            process = Popen(
                program, cwd=self.work, env=self.env, stdin=DEVNULL, stdout=DEVNULL, stderr=out
            )
            resource.prlimit(process.pid, resource.RLIMIT_CPU, (limit, limit + 5))
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # nothing is left to wait for
        text = log.read_text()
        # Long lines are folded. The next part of a line is indented more than the line.
        message = re.search(r"^error: (.*(?:\n {2}(?!(?:where|why|cause|fix):).*)*)", text, re.M)
        fix = re.search(r"^  fix: (.*(?:\n {4}.*)*)", text, re.M)
        return {
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
            "exit_code": process.returncode,
            "torch": text.endswith("True\n"),
            "message": re.sub(r"\s*\n\s*", " ", message[1] if message else ""),
            "fix": re.sub(r"\s*\n\s*", " ", fix[1] if fix else ""),
        }

    def apply(self, mistake: Mistake, command: str, part: re.Match[str]) -> list[str]:
        """Return the words of the command with a part of a fix, or of the fix's own command."""
        words = mistake.split_words()
        if part["command"]:
            _, verb, *rest = shlex.split(part["command"])
            if verb == command:
                return rest
            self.run(verb, rest)
            return words
        if part["name"]:
            self.renew(mistake.right, part["name"])
            return [word.replace(mistake.wrong, part["name"]) for word in words]
        if part["option"] in words:
            words[words.index(part["option"]) + 1] = part["value"]
        elif part["option"]:
            words += [part["option"], part["value"]]
        elif part["key"] and command != PYTHON:
            words.append("=".join((part["key"], part["set"].strip("\"'"))))
        else:
            words.append(part[0])
        return words

    def measure(self, mistake: Mistake, command: str) -> dict[str, Any]:
        """Make a mistake, apply the fix, and return how the command has ended both times."""
        self.renew(mistake.right, mistake.wrong)
        first = self.run(command, mistake.split_words())
        part = COPIED.search(first["fix"])
        outcome = None
        if part:
            self.renew(mistake.right, mistake.wrong)
            again = self.run(command, self.apply(mistake, command, part))
            outcome = again["message"] or f"exit code {again['exit_code']}"
            if again["exit_code"] in (0, -signal.SIGXCPU):  # the end, or still training
                outcome = "works"
            elif again["message"] == first["message"]:
                outcome = "same error"
        return {**first, "applied": part and part[0], "outcome": outcome}


def table(results: list[dict[str, Any]], sources: list[str]) -> str:
    """Return a Markdown table. It has the seconds of all sources, and the texts of the last."""
    texts = ("exit_code", "torch", "message", "fix", "applied", "outcome")
    columns = ["mistake", "command", *(f"CPU s, {source}" for source in sources), *texts]
    lines = [columns, ["---"] * len(columns)]
    for row in results:
        same = [each for each in results if all(each[key] == row[key] for key in columns[:2])]
        if row is same[-1]:
            seconds = [each["cpu_seconds"] for each in same]
            values = [row["mistake"], row["command"], *seconds, *(row[name] for name in texts)]
            lines.append([str(value).replace("|", "\\|") for value in values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--source", nargs="+", default=["src"], help="src folders of checkouts")
    parser.add_argument("--only", default="", help="a part of the mistakes' names")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    chosen = [(one, to) for one in MISTAKES if options.only in one.name for to in one.commands]
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, source in enumerate(options.source):
            bench = Bench(Path(scratch, str(number)), source, Path(scratch, "cache"))
            for mistake, command in chosen:
                names = {"source": source, "mistake": mistake.name, "command": command}
                results.append({**names, **bench.measure(mistake, command)})
                print(results[-1], file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    print(table(results, options.source))


if __name__ == "__main__":
    main()
