"""What goes wrong before the first step: recipes, rows, models, adapters, folders and command
lines.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from cli.bad_world import TURNS, Case, World
from tunesmith.errors import EXIT_FAILED

PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
    }
]
GOOD = '{"prompt": "a", "completion": "b"}\n'


def line(**row: Any) -> str:
    return json.dumps(row) + "\n"


def config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def cut(file: Path, count: int = 1000) -> None:
    file.write_bytes(file.read_bytes()[:-count])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def half_the_shards(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def stored_as(dtype: str) -> Any:
    def spoil(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        save_file(
            {k: v.to(getattr(torch, dtype)) for k, v in tensors.items()},
            folder / "model.safetensors",
        )

    return spoil


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def template(text: str) -> Any:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


RECIPES = [
    Case("recipe", "no such file", lambda w: ["train", str(w.folder / "no.yaml")], "no.yaml", "tunesmith recipes"),
    Case("recipe", "a name that does not ship", lambda w: ["train", "smollm2-135m-lore"], "smollm2-135m-lore", "smollm2-135m-lora"),
    Case("recipe", "a folder", lambda w: ["train", str(w.write("a_folder/x", "").parent)], "a_folder", ".yaml"),
    Case("recipe", "in the home of nobody", lambda w: ["train", "~no-such-user/r.yaml"], "~no-such-user/r.yaml", "tunesmith recipes"),
    Case("recipe", "broken UTF-8", lambda w: ["train", str(w.write("recipe.yaml", b"model: caf\xe9\n"))], "recipe.yaml", "UTF-8", "iconv"),
    Case("recipe", "binary junk", lambda w: ["train", str(w.write("recipe.yaml", bytes(range(256)) * 9))], "recipe.yaml:2", "UTF-8", "iconv"),
    Case("recipe", "unknown key", lambda w: w.train(train={"learing_rate": 1e-4}), "recipe.yaml:", "learing_rate", "learning_rate"),
]  # fmt: skip

DATA = [
    Case("data", "no such file", lambda w: w.train(data={"train": {"source": str(w.folder / "trian.jsonl")}}), "trian.jsonl", "train.jsonl"),
    Case("data", "no such validation file", lambda w: w.train(held=True, data={"validation": {"source": str(w.folder / "no.jsonl")}}), "no.jsonl"),
    Case("data", "row 40 is no JSON", lambda w: w.rows("a.jsonl", GOOD * 39 + "{'prompt': 'a'}\n"), "a.jsonl:40", "not JSON", "sed -n 40p"),
    Case("data", "binary junk", lambda w: w.rows("a.jsonl", bytes(range(256)) * 99), "a.jsonl:1", "not JSON", "sed -n 1p"),
    Case("data", "a web page named json", lambda w: w.rows("a.json", "<!doctype html><html>"), "a.json", "not JSON", "column 1"),
    Case("data", "a column of the wrong name", lambda w: w.rows("a.jsonl", GOOD, source={"columns": {"prompt": "question"}}), "a.jsonl:1", "question", "columns:"),
    Case("data", "an empty validation split", lambda w: w.train(held=True, data={"validation": {"source": str(w.write("v.jsonl", GOOD)), "split": "train[:1%]"}}), "v.jsonl", "train[:1%]"),
    Case("data", "a row of 40 MiB", lambda w: w.rows("a.jsonl", GOOD + line(prompt="a" * (40 << 20), completion="b")), "a.jsonl:2", "MiB"),
    Case("data", "a row of 500 thousand tokens", lambda w: w.rows("a.jsonl", GOOD + line(prompt="a" * 500_000, completion="b"), too_long="error"), "a.jsonl:2", "500022 tokens", "seq_len"),
    Case("data", "prompts so long that nothing is supervised", lambda w: w.rows("a.jsonl", line(prompt="a" * 500, completion="b") * 4), "a.jsonl", "token contract", "seq_len"),
    Case("data", "all rows dropped", lambda w: w.rows("a.jsonl", line(prompt="a" * 500, completion="b") * 4, too_long="drop"), "a.jsonl", "token contract", "seq_len"),
    Case("data", "a weight of 1e12", lambda w: w.rows("a.jsonl", GOOD * 9, source={"weight": 1e12}), "data.train", "9,000,000,000,000 examples"),
    Case("data", "a template that cannot be masked", lambda w: w.spoilt(template("{% for m in messages %}{{ m.content | upper | reverse }}{% endfor %}"), data={"train": {"source": str(w.write("m.jsonl", line(messages=TURNS))), "format": "messages"}}), "m.jsonl:1", "generation"),
    Case("data", "a template that does not parse", lambda w: w.spoilt(template("{% for m in %}"), data={"train": {"source": str(w.write("m.jsonl", line(messages=TURNS))), "format": "messages"}}), "m.jsonl:1", "data.template="),
    Case("data", "a chat template where there is none", lambda w: w.spoilt(no_template, data={"template": "chat"}), "data.template", "alpaca"),
    Case("data", "tools that the template ignores", lambda w: w.spoilt(template(PLAIN), data={"seq_len": 512, "train": {"source": str(w.write("m.jsonl", line(messages=TURNS, tools=TOOLS))), "format": "messages"}}), "m.jsonl:1", "data.template=FILE.jinja"),
    Case("data", "template arguments that are a list", lambda w: w.train(data={"template_args": ["enable_thinking"]}), "recipe.yaml:", "template_args", "mapping"),
    Case("data", "an argument that the template does not take", lambda w: w.train(data={"template": "chat", "template_args": {"enable_thinking": True}}), "data.template_args.enable_thinking", "enable_thinking", "none"),
    Case("data", "no template file", lambda w: w.train(data={"template": "mine.jinja"}), "recipe.yaml:", "alpaca"),
    Case("data", "data verb, broken row", lambda w: ["data", *w.rows("a.jsonl", GOOD + "oops\n")[1:]], "a.jsonl:2", "not JSON", "sed -n 2p"),
    Case("data", "data verb, nothing to learn", lambda w: ["data", *w.rows("a.jsonl", line(prompt="a" * 500, completion="b") * 4)[1:]], "a.jsonl", "token contract", "seq_len"),
]  # fmt: skip

MODELS = [
    Case("model", "no such folder", lambda w: w.train(tiny=w.folder / "no-model"), "model.name"),
    Case("model", "not on this machine, offline", lambda w: w.train(tiny=Path("someone/tiny")), "hub", "HF_HUB_OFFLINE", "tunesmith fetch"),
    Case("model", "no tokenizer", lambda w: w.spoilt(lambda f: (f / "tokenizer.json").unlink()), "model", "tokenizer", "model.tokenizer"),
    Case("model", "no config", lambda w: w.spoilt(lambda f: (f / "config.json").unlink()), "model", "config.json", "tunesmith fetch"),
    Case("model", "broken config", lambda w: w.spoilt(lambda f: (f / "config.json").write_text("{\n oops")), "config.json:2", "not JSON"),
    Case("model", "cut-off weights", lambda w: w.spoilt(lambda f: cut(f / "model.safetensors")), "model.safetensors"),
    Case("model", "a shard is missing", lambda w: w.spoilt(half_the_shards), "model", "1 of 1"),
    Case("model", "unread weight type", lambda w: w.spoilt(stored_as("float8_e4m3fn")), "model", "20 tensors"),
    Case("model", "only pickles", lambda w: w.spoilt(pickled), "model", "pickle", "AutoModelForCausalLM"),
    Case("model", "experts that are not stored", lambda w: w.spoilt(lambda f: config(f, model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=8)), "model", "tensors missing", "mlp.experts"),
    Case("model", "tensors of another shape", lambda w: w.spoilt(lambda f: config(f, intermediate_size=96)), "model", "config.json", "96"),
    Case("model", "broken GGUF", lambda w: w.train(tiny=w.write("m.gguf", b"GGUF" + bytes(50))), "m.gguf"),
    Case("model", "empty GGUF", lambda w: w.train(tiny=w.write("m.gguf", b"")), "m.gguf"),
    Case("model", "fp16 on a CPU", lambda w: w.train("model.dtype=fp16"), "model.dtype", "fp16", "bf16"),
    Case("model", "target that is not there", lambda w: w.train("adapter.target=[q_prj]"), "adapter.target", "q_prj", "all-linear"),
    Case("adapter", "no such adapter", lambda w: w.train(adapter={"from": str(w.folder / "no-adapter")}), "adapter.from", "output_dir"),
    Case("adapter", "a folder without one", lambda w: w.train(adapter={"from": str(w.tiny)}), "tiny", "adapter_config.json", "PEFT"),
]  # fmt: skip


def unfinished(world: World) -> str:
    """A run directory without a checkpoint."""
    run = world.begun()
    for folder in (*run.glob("checkpoint-*"), run / "final"):
        shutil.rmtree(folder)
    return str(run)


VERBS = [
    Case("verb", "unknown command", lambda w: ["trian"], "command line", "trian", "tunesmith train"),
    Case("verb", "unknown option", lambda w: w.train("--freshh"), "command line", "--freshh", "did you mean --fresh?"),
    Case("verb", "no recipe", lambda w: ["train"], "command line", "recipe", "--data"),
    Case("verb", "merge into a full folder", lambda w: ["merge", str(w.begun()), "--output", str(w.write("m/mine.txt", "mine").parent)], "--output", "--force"),
    Case("verb", "merge a plain model", lambda w: ["merge", str(w.tiny), "--output", str(w.folder / "m")], "tiny", "adapter"),
    Case("verb", "merge onto a file", lambda w: ["merge", str(w.begun()), "--output", str(w.write("m", "mine"))], "--output", "/m is a file"),
    Case("verb", "merge, no output", lambda w: ["merge", str(w.begun())], "command line: tunesmith merge", "--output"),
    Case("verb", "merge, an unknown type", lambda w: ["merge", str(w.begun()), "--output", str(w.folder / "m"), "--dtype", "int8"], "command line: tunesmith merge", "--dtype", "int8"),
    Case("verb", "recipes, unknown name", lambda w: ["recipes", "show", "smollm3"], "smollm3", "tunesmith recipes"),
    Case("verb", "recipes, onto a file", lambda w: ["recipes", "copy", "smollm2-135m-lora", str(w.write("r.yaml", "mine"))], "r.yaml", "--force"),
    Case("verb", "recipes, into no folder", lambda w: ["recipes", "copy", "smollm2-135m-lora", str(w.folder / "no" / "r.yaml")], "DEST", "mkdir"),
    Case("verb", "fetch, nothing there", lambda w: ["fetch", str(w.folder / "nothing")], "model.name", "nothing"),
    Case("verb", "fetch, from the home of nobody", lambda w: ["fetch", "~no-such-user/model"], "model.name", "~no-such-user"),
    Case("chat", "no such run", lambda w: ["chat", str(w.folder / "no-run")], "no-run", "output_dir"),
    Case("chat", "a data file", lambda w: ["chat", str(w.write("a.jsonl", GOOD))], "a.jsonl", ".jsonl file"),
    Case("chat", "a run that did not finish", lambda w: ["chat", unfinished(w)], "run", "tunesmith train", code=EXIT_FAILED),
    Case("eval", "no such file", lambda w: ["eval", str(w.begun()), "--data", str(w.folder / "no.jsonl")], "no.jsonl"),
    Case("eval", "no data", lambda w: ["eval", str(w.begun())], "--data", "data.hold_out"),
    Case("eval", "zero rows", lambda w: w.evaluate(GOOD, "--max-examples", "0"), "command line: tunesmith eval", "--max-examples"),
    Case("eval", "new tokens", lambda w: w.evaluate(GOOD, "--max-new-tokens", "0"), "--max-new-tokens", "at least 1"),
    Case("eval", "rows without answers", lambda w: w.evaluate(line(prompt="a")), "b.jsonl:1", "completion", "delete the row"),
    Case("eval", "text has no answers", lambda w: w.evaluate(line(text="abc"), "--score", "exact"), "b.jsonl", "--score"),
    Case("eval", "an unknown scorer", lambda w: w.evaluate(GOOD, "--score", "accuracy"), "--score", "accuracy", "rouge-l", "file.py:function"),
    Case("eval", "a scorer's file that is not there", lambda w: w.evaluate(GOOD, "--score", "mine.py:f"), "--score mine.py:f", "mine.py"),
    Case("eval", "a scorer without its function", lambda w: w.evaluate(GOOD, "--score", f"{w.write('mine.py', 'x = 1')}:f"), "--score", "no function f", "def f"),
    Case("eval", "a scorer that cannot be loaded", lambda w: w.evaluate(GOOD, "--score", f"{w.write('mine.py', 'import nothing_here')}:f"), "--score", "cannot be loaded", "nothing_here"),
    Case("eval", "a reference that is no pattern", lambda w: w.evaluate(line(prompt="a", completion="(b"), "--score", "regex"), "b.jsonl:1", "regular expression", "missing )"),
    Case("eval", "a reference that is no JSON", lambda w: w.evaluate(GOOD + line(prompt="a", completion="{"), "--score", "json"), "b.jsonl:1", "not JSON"),
    Case("eval", "a schema that is none", lambda w: w.evaluate(line(prompt="a", completion="1", schema={"type": "x"}), "--score", "json"), "b.jsonl:1, schema", "not a JSON schema"),
    Case("eval", "a reference that does not fit its schema", lambda w: w.evaluate(line(prompt="a", completion="1", schema={"type": "string"}), "--score", "json"), "b.jsonl:1, schema", "does not match"),
    Case("eval", "tool calls without tools", lambda w: w.evaluate(line(messages=[*TURNS]), "--score", "tool-call"), "b.jsonl:1", "no tools", "--score"),
    Case("eval", "text has no answers to score", lambda w: w.evaluate(line(text="abc"), "--score", "exact"), "b.jsonl", "--score"),
    Case("eval", "only empty answers to score", lambda w: w.evaluate(line(prompt="a", completion=""), "--score", "exact"), "b.jsonl", "every answer is empty"),
    Case("eval", "an output without a score", lambda w: w.evaluate(GOOD, "--output", "o.jsonl"), "--output", "--score"),
    Case("eval", "fresh without a score", lambda w: w.evaluate(GOOD, "--fresh"), "--fresh", "--score"),
    Case("eval", "a temperature without a score", lambda w: w.evaluate(GOOD, "--temperature", "1"), "--temperature", "--score"),
    Case("eval", "top-p without a temperature", lambda w: w.evaluate(GOOD, "--score", "exact", "--top-p", "0.9"), "--temperature", "top-p"),
    Case("eval", "an output that is a folder", lambda w: w.evaluate(GOOD, "--score", "exact", "--output", str(w.folder)), "--output", "cannot be read"),
    Case("eval", "an output of somebody else", lambda w: w.evaluate(GOOD, "--score", "exact", "--output", str(w.write("o.jsonl", GOOD))), "o.jsonl", "does not contain answers from eval", "--output"),
    Case("eval", "an output below a file", lambda w: w.evaluate(GOOD, "--score", "exact", "--output", str(w.write("o.txt", "") / "o.jsonl")), "o.jsonl", "cannot be", "--output"),
    Case("eval", "no room for the answer", lambda w: w.evaluate(GOOD, "--score", "exact", "--max-new-tokens", "4096"), "b.jsonl:1", "too short", "--max-new-tokens"),
    Case("eval", "an unknown split", lambda w: w.evaluate(GOOD, "--split", "test"), "b.jsonl", "test", "--split train"),
]  # fmt: skip

GENERATE = [
    Case("generate", "no such run", lambda w: ["generate", str(w.folder / "no-run"), "--input", "-", "--output", "-"], "no-run", "output_dir"),
    Case("generate", "no such input", lambda w: ["generate", str(w.begun()), "--input", str(w.folder / "no.jsonl"), "--output", "-"], "no.jsonl", "- for stdin"),
    Case("generate", "broken line", lambda w: w.generate('{"prompt": "a"}\n{"prompt":\n'), "b.jsonl:2", "not JSON"),
    Case("generate", "unknown columns", lambda w: w.generate(line(foo="a")), "b.jsonl", "foo"),
    Case("generate", "format without its column", lambda w: w.generate(GOOD, "--format", "messages"), "b.jsonl:1", "messages"),
    Case("generate", "messages that are no list", lambda w: w.generate(line(messages={"role": "user"})), "b.jsonl:1", "list"),
    Case("generate", "no messages", lambda w: w.generate(line(messages=[])), "b.jsonl:1", "messages"),
    Case("generate", "prompt too long", lambda w: w.generate(GOOD + line(prompt="a" * 5000)), "b.jsonl:2", "5019 tokens", "--max-new-tokens"),
    Case("generate", "output is there", lambda w: w.generate_to(w.write("out.jsonl", "{}\n")), "--output", "--resume", "--force"),
    Case("generate", "output under a file", lambda w: w.generate_to(w.write("f", "") / "out.jsonl"), "--output", "f/out.jsonl"),
    Case("generate", "output is a folder", lambda w: w.generate_to(w.folder), "--output", "cannot be read"),
    Case("generate", "output is the input", lambda w: w.generate_to(w.folder / "held.jsonl", "--force"), "--output", "same file"),
    Case("generate", "resume of other rows", lambda w: w.generate_to(w.write("o", '{"a": 1, "output": ""}\n'), "--resume"), "o:1", "--force"),
    Case("generate", "resume of no JSON", lambda w: w.generate_to(w.write("o", "hello\n"), "--resume"), "o:1", "--force"),
    Case("generate", "resume of stdout", lambda w: w.generate(GOOD, "--resume"), "--output -", "--resume"),
    Case("generate", "resume and force", lambda w: w.generate(GOOD, "--resume", "--force"), "command line: tunesmith generate", "--resume", "--force"),
    Case("generate", "temperature", lambda w: w.generate(GOOD, "--temperature", "-1"), "--temperature", "-1"),
    Case("generate", "temperature is a word", lambda w: w.generate(GOOD, "--temperature", "hot"), "command line: tunesmith generate", "--temperature", "hot"),
    Case("generate", "top-p alone", lambda w: w.generate(GOOD, "--top-p", "0.5"), "--temperature", "top-p"),
    Case("generate", "batch size", lambda w: w.generate(GOOD, "--batch-size", "0"), "command line: tunesmith generate", "--batch-size"),
    Case("generate", "new tokens", lambda w: w.generate(GOOD, "--max-new-tokens", "0"), "--max-new-tokens", "0"),
    Case("generate", "a device that is not there", lambda w: w.generate(GOOD, "--device", "cuda:99"), "--device", "cuda:99", "cpu"),
    Case("generate", "a device that is none", lambda w: w.generate(GOOD, "--device", "toaster"), "--device", "toaster", "cpu"),
]  # fmt: skip

SCRIPTS = [
    Case("script", "unknown flag", lambda w: w.script("--learnin_rate", "1"), "command line", "--learnin_rate", "--learning_rate"),
    Case("script", "batch of 0", lambda w: w.script("--batch_size", "0"), "command line", "--batch_size"),
    Case("script", "batch of many", lambda w: w.script("--batch_size", "many"), "command line", "--batch_size", "many"),
    Case("script", "rate of nan", lambda w: w.script("--learning_rate", "nan"), "command line", "--learning_rate", "nan"),
    Case("script", "no such model", lambda w: w.script("--model_name", str(w.folder / "no"), name="Llama3_3B_full_finetuning"), "--model_name"),
    Case("script", "no such data", lambda w: w.script("--data", str(w.folder / "no.jsonl")), "no.jsonl"),
    Case("script", "rows of another shape", lambda w: w.script("--data", str(w.write("r.jsonl", GOOD)), name="Llama3_70B_LoRA_finetuning"), "r.jsonl:1", "columns:"),
    Case("script", "folder is a file", lambda w: w.script("--output_dir", str(w.write("taken", "mine"))), "taken", "--output_dir"),
    Case("script", "float16 on a CPU", lambda w: w.script("--dtype", "float16"), "--dtype", "fp16", "--dtype bfloat16, or --dtype float32"),
    Case("script", "broken weights", lambda w: w.script("--model_name", str(w.model(lambda f: cut(f / "model.safetensors"))), name="Llama3_70B_qLoRA_finetuning"), "model.safetensors"),
    Case("script", "log_dir is a file", lambda w: w.script("--log_dir", str(w.write("events", "mine"))), "events", "TensorBoard"),
]  # fmt: skip

FOLDERS = [
    Case("folder", "output_dir is a file", lambda w: w.train(output_dir=str(w.write("taken", "mine"))), "taken", "output_dir"),
    Case("folder", "output_dir under a file", lambda w: w.train(output_dir=str(w.write("taken", "mine") / "run")), "taken", "output_dir"),
    Case("folder", "output_dir in /proc", lambda w: w.train(output_dir="/proc/tunesmith"), "/proc", "output_dir"),
    Case("folder", "output_dir has too long a name", lambda w: w.train(output_dir=str(w.folder / ("a" * 300))), "aaa"),
    Case("folder", "output_dir with a null character", lambda w: w.train('output_dir="a\\0b"'), "output_dir"),
    Case("folder", "TensorBoard under a file", lambda w: w.train(log={"tensorboard": True, "tensorboard_dir": str(w.write("f", "mine") / "tb")}), "f/tb", "TensorBoard", "log.tensorboard"),
]  # fmt: skip
ALL = [*RECIPES, *DATA, *MODELS, *VERBS, *GENERATE, *SCRIPTS, *FOLDERS]
