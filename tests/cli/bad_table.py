"""What goes wrong before the first step: recipes, rows, models, adapters, folders and command lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cli.bad_world import TURNS, Case

PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
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
        save_file({k: v.to(getattr(torch, dtype)) for k, v in tensors.items()}, folder / "model.safetensors")

    return spoil


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def template(text: str) -> Any:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


RECIPES = [
    Case("recipe", "no such file", lambda w: ["train", str(w.folder / "no.yaml")], "no.yaml", "no.yaml", "tunesmith recipes"),
    Case("recipe", "a name that does not ship", lambda w: ["train", "smollm2-135m-lore"], "no recipe", "smollm2-135m-lore", "smollm2-135m-lora"),
    Case("recipe", "a folder", lambda w: ["train", str(w.write("a_folder/x", "").parent)], "not a recipe", "a_folder", ".yaml"),
    Case("recipe", "empty file", lambda w: w.text(""), "empty", "recipe.yaml", "tunesmith recipes"),
    Case("recipe", "not YAML", lambda w: w.text("model: {name: x\ndata: ]"), "not YAML", "recipe.yaml:2", "mend"),
    Case("recipe", "broken UTF-8", lambda w: ["train", str(w.write("recipe.yaml", b"model: caf\xe9\n"))], "UTF-8", "recipe.yaml", "iconv"),
    Case("recipe", "binary junk", lambda w: ["train", str(w.write("recipe.yaml", bytes(range(256)) * 9))], "UTF-8", "recipe.yaml:2", "iconv"),
    Case("recipe", "tab indents", lambda w: w.text("model:\n\tname: x\n"), "not YAML", "recipe.yaml:2", "spaces"),
    Case("recipe", "unknown key", lambda w: w.train(train={"learing_rate": 1e-4}), "learing_rate", "recipe.yaml:", "learning_rate"),
    Case("recipe", "another tool's key", lambda w: w.train(train={"per_device_train_batch_size": 4}), "per_device_train_batch_size", "recipe.yaml:", "batch"),
    Case("recipe", "wrong type", lambda w: w.train(data={"pack": "true"}), "data.pack", "recipe.yaml:", "true"),
    Case("recipe", "missing key", lambda w: w.text("model: {name: x}\noutput_dir: run\n"), "data is missing", "recipe.yaml:1", "add data"),
    Case("recipe", "override without a value", lambda w: w.train("train.learning_rate"), "key.sub=value", "command line", "train.learning_rate=2e-4"),
    Case("recipe", "override of a wrong type", lambda w: w.train("train.seed=many"), "whole number", "command line: train.seed", "train.seed=8"),
    Case("recipe", "rank without an adapter", lambda w: w.train("adapter.kind=none", "adapter.rank=4"), "no effect", "adapter.rank", "remove"),
    Case("recipe", "extends itself", lambda w: w.text("extends: recipe.yaml\n"), "circle", "recipe.yaml:1", "remove"),
]  # fmt: skip

DATA = [
    Case("data", "no such file", lambda w: w.train(data={"train": {"source": str(w.folder / "trian.jsonl")}}), "no such file", "trian.jsonl", "train.jsonl"),
    Case("data", "no such validation file", lambda w: w.train(held=True, data={"validation": {"source": str(w.folder / "no.jsonl")}}), "no such file", "no.jsonl", "did you mean"),
    Case("data", "empty file", lambda w: w.rows("a.jsonl", ""), "empty", "a.jsonl", "write rows"),
    Case("data", "blank lines", lambda w: w.rows("a.jsonl", "\n\n \n"), "blank", "a.jsonl", "write rows"),
    Case("data", "row 40 is no JSON", lambda w: w.rows("a.jsonl", GOOD * 39 + "{'prompt': 'a'}\n"), "not JSON", "a.jsonl:40", "sed -n 40p"),
    Case("data", "cut off in the middle", lambda w: w.rows("a.jsonl", GOOD * 3 + GOOD[:15]), "not JSON", "a.jsonl:4", "last line"),
    Case("data", "a row of another shape", lambda w: w.rows("a.jsonl", GOOD * 3 + line(question="a", answer="b")), "no column prompt", "a.jsonl:4", "columns:"),
    Case("data", "missing column", lambda w: w.rows("a.jsonl", line(instruction="a") * 3, "alpaca"), "no column output", "a.jsonl:1", "columns:"),
    Case("data", "number in place of text", lambda w: w.rows("a.jsonl", GOOD + line(prompt="a", completion=5)), "number", "a.jsonl:2", "quotes"),
    Case("data", "null in place of text", lambda w: w.rows("a.jsonl", GOOD + line(prompt="a", completion=None)), "null", "a.jsonl:2", "delete the row"),
    Case("data", "broken UTF-8", lambda w: w.rows("a.jsonl", GOOD.encode() + b'{"prompt": "\xff", "completion": "b"}\n'), "UTF-8", "a.jsonl:2", "iconv"),
    Case("data", "UTF-16", lambda w: w.rows("a.jsonl", GOOD.encode("utf-16")), "UTF-8", "a.jsonl:1", "iconv -f utf-16"),
    Case("data", "binary junk", lambda w: w.rows("a.jsonl", bytes(range(256)) * 99), "not JSON", "a.jsonl:1", "sed -n 1p"),
    Case("data", "a zip named jsonl", lambda w: w.rows("a.jsonl", b"PK\3\4" + bytes(5000)), "not JSON", "a.jsonl:1", "fetch or write"),
    Case("data", "a web page named json", lambda w: w.rows("a.json", "<!doctype html><html>"), "not JSON", "a.json", "line 1 column 1"),
    Case("data", "an LFS pointer", lambda w: w.rows("a.jsonl", "version https://git-lfs.github.com/spec/v1\n"), "not JSON", "a.jsonl:1", "sed -n 1p"),
    Case("data", "an unknown kind of file", lambda w: w.rows("a.xlsx", b"PK\3\4"), "not a kind of file", "a.xlsx", "JSON lines"),
    Case("data", "ragged CSV", lambda w: w.rows("a.csv", "prompt,completion\na,b\na,b,c\n"), "3 values", "a.csv:3", "quotes"),
    Case("data", "truncated parquet", lambda w: w.rows("a.parquet", b"PAR1" + bytes(500)), "parquet", "a.parquet", "fetch or write"),
    Case("data", "a column of the wrong name", lambda w: w.rows("a.jsonl", GOOD, source={"columns": {"prompt": "question"}}), "question", "a.jsonl:1", "columns:"),
    Case("data", "an unknown split", lambda w: w.rows("a.jsonl", GOOD, source={"split": "test"}), "no split test", "a.jsonl", "train"),
    Case("data", "an empty validation split", lambda w: w.train(held=True, data={"validation": {"source": str(w.write("v.jsonl", GOOD)), "split": "train[:1%]"}}), "no rows", "v.jsonl", "widen"),
    Case("data", "a row of 40 MiB", lambda w: w.rows("a.jsonl", GOOD + line(prompt="a" * (40 << 20), completion="b")), "MiB", "a.jsonl:2", "one row a line"),
    Case("data", "a row of 500 thousand tokens", lambda w: w.rows("a.jsonl", GOOD + line(prompt="a" * 500_000, completion="b"), too_long="error"), "500002 tokens", "a.jsonl:2", "seq_len"),
    Case("data", "prompts so long that nothing is learnt", lambda w: w.rows("a.jsonl", line(prompt="a" * 500, completion="b") * 4), "token contract", "a.jsonl", "seq_len"),
    Case("data", "all rows dropped", lambda w: w.rows("a.jsonl", line(prompt="a" * 500, completion="b") * 4, too_long="drop"), "token contract", "a.jsonl", "seq_len"),
    Case("data", "a conversation without an answer", lambda w: w.rows("a.jsonl", line(messages=TURNS[:1]), "messages"), "assistant", "a.jsonl:1", "delete the row"),
    Case("data", "a template that cannot be masked", lambda w: w.spoilt(template("{% for m in messages %}{{ m.content | upper | reverse }}{% endfor %}"), data={"train": {"source": str(w.write("m.jsonl", line(messages=TURNS))), "format": "messages"}}), "nothing shows where answers lie", "m.jsonl:1", "generation"),
    Case("data", "a template that does not parse", lambda w: w.spoilt(template("{% for m in %}"), data={"train": {"source": str(w.write("m.jsonl", line(messages=TURNS))), "format": "messages"}}), "cannot render", "m.jsonl:1", "data.template="),
    Case("data", "a chat template where there is none", lambda w: w.spoilt(no_template, data={"template": "chat"}), "no chat template", "data.template", "alpaca"),
    Case("data", "tools that the template ignores", lambda w: w.spoilt(template(PLAIN), data={"seq_len": 512, "train": {"source": str(w.write("m.jsonl", line(messages=TURNS, tools=TOOLS))), "format": "messages"}}), "tool", "m.jsonl:1", "data.template=FILE.jinja"),
    Case("data", "no template file", lambda w: w.train(data={"template": "mine.jinja"}), "no such file", "recipe.yaml:", "alpaca"),
    Case("data", "data verb, broken row", lambda w: ["data", *w.rows("a.jsonl", GOOD + "oops\n")[1:]], "not JSON", "a.jsonl:2", "sed -n 2p"),
    Case("data", "data verb, nothing to learn", lambda w: ["data", *w.rows("a.jsonl", line(prompt="a" * 500, completion="b") * 4)[1:]], "token contract", "a.jsonl", "seq_len"),
]  # fmt: skip

MODELS = [
    Case("model", "no such folder", lambda w: w.train(tiny=w.folder / "no-model"), "nothing at", "model.name", "Hub id"),
    Case("model", "not on this machine, offline", lambda w: w.train(tiny=Path("someone/tiny")), "HF_HUB_OFFLINE", "hub", "tunesmith fetch"),
    Case("model", "no tokenizer", lambda w: w.spoilt(lambda f: (f / "tokenizer.json").unlink()), "tokenizer", "model", "model.tokenizer"),
    Case("model", "no config", lambda w: w.spoilt(lambda f: (f / "config.json").unlink()), "config.json", "model", "tunesmith fetch"),
    Case("model", "broken config", lambda w: w.spoilt(lambda f: (f / "config.json").write_text("{\n oops")), "not JSON", "config.json:2", "correct the file"),
    Case("model", "cut-off weights", lambda w: w.spoilt(lambda f: cut(f / "model.safetensors")), "damaged", "model.safetensors", "copy the file again"),
    Case("model", "a shard is missing", lambda w: w.spoilt(half_the_shards), "1 of 1", "model", "finish the download"),
    Case("model", "unread weight type", lambda w: w.spoilt(stored_as("float8_e4m3fn")), "type", "model", "fetch the model again"),
    Case("model", "only pickles", lambda w: w.spoilt(pickled), "pickle", "model", "AutoModelForCausalLM"),
    Case("model", "mixture of experts", lambda w: w.spoilt(lambda f: config(f, model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=8)), "mixture of 8 experts", "config.json", "dense text decoder"),
    Case("model", "multimodal", lambda w: w.spoilt(lambda f: config(f, model_type="llava", vision_config={}, architectures=["LlavaForConditionalGeneration"])), "multimodal", "config.json", "dense text decoder"),
    Case("model", "encoder", lambda w: w.spoilt(lambda f: config(f, model_type="bert", architectures=["BertForMaskedLM"])), "encoder", "config.json", "dense text decoder"),
    Case("model", "tensors of another shape", lambda w: w.spoilt(lambda f: config(f, intermediate_size=96)), "shape", "model", "correct config.json"),
    Case("model", "broken GGUF", lambda w: w.train(tiny=w.write("m.gguf", b"GGUF" + bytes(50))), "cannot be read", "m.gguf", "download it again"),
    Case("model", "empty GGUF", lambda w: w.train(tiny=w.write("m.gguf", b"")), "not a GGUF", "m.gguf", "download it again"),
    Case("model", "fp16 on a CPU", lambda w: w.train("model.dtype=fp16"), "fp16", "model.dtype", "bf16"),
    Case("model", "target that is not there", lambda w: w.train("adapter.target=[q_prj]"), "q_prj", "adapter.target", "all-linear"),
    Case("adapter", "no such adapter", lambda w: w.train(adapter={"from": str(w.folder / "no-adapter")}), "neither a folder", "adapter.from", "adapter_config.json"),
    Case("adapter", "a folder without one", lambda w: w.train(adapter={"from": str(w.tiny)}), "adapter_config.json", "tiny", "PEFT"),
]  # fmt: skip

VERBS = [
    Case("verb", "unknown command", lambda w: ["trian"], "trian", "command line", "train"),
    Case("verb", "unknown option", lambda w: w.train("--freshh"), "--freshh", "command line", "--fresh"),
    Case("verb", "no recipe", lambda w: ["train"], "recipe", "command line", "--help"),
    Case("verb", "chat, no such run", lambda w: ["chat", str(w.folder / "no-run")], "no-run", "no-run", "output_dir"),
    Case("verb", "chat, a data file", lambda w: ["chat", str(w.write("a.jsonl", GOOD))], "not a model", "a.jsonl", "run directory"),
    Case("verb", "eval, no such file", lambda w: ["eval", str(w.begun()), "--data", str(w.folder / "no.jsonl")], "no such file", "no.jsonl", "did you mean"),
    Case("verb", "eval, rows without answers", lambda w: ["eval", str(w.begun()), "--data", str(w.write("a.jsonl", line(prompt="a")))], "completion", "a.jsonl:1", "columns:"),
    Case("verb", "generate, no such input", lambda w: ["generate", str(w.begun()), "--input", str(w.folder / "no.jsonl"), "--output", "-"], "no file", "no.jsonl", "- for stdin"),
    Case("verb", "generate, output is there", lambda w: ["generate", str(w.begun()), "--input", str(w.folder / "held.jsonl"), "--output", str(w.write("out.jsonl", "{}\n"))], "already there", "--output", "--resume"),
    Case("verb", "generate, output under a file", lambda w: ["generate", str(w.begun()), "--input", str(w.folder / "held.jsonl"), "--output", str(w.write("f", "") / "out.jsonl")], "cannot be written", "--output", "may write"),
    Case("verb", "generate, prompt too long", lambda w: ["generate", str(w.begun()), "--input", str(w.write("a.jsonl", line(prompt="a" * 5000))), "--output", "-"], "too long", "a.jsonl:1", "--max-new-tokens"),
    Case("verb", "merge into a full folder", lambda w: ["merge", str(w.begun()), "--output", str(w.write("m/mine.txt", "mine").parent)], "not empty", "--output", "--force"),
    Case("verb", "merge a plain model", lambda w: ["merge", str(w.tiny), "--output", str(w.folder / "m")], "no adapter", "tiny", "as it is"),
    Case("verb", "merge onto a file", lambda w: ["merge", str(w.begun()), "--output", str(w.write("m", "mine"))], "is a file", "--output", "new or empty"),
    Case("verb", "recipes, unknown name", lambda w: ["recipes", "show", "smollm3"], "no recipe", "smollm3", "tunesmith recipes"),
    Case("verb", "recipes, onto a file", lambda w: ["recipes", "copy", "smollm2-135m-lora", str(w.write("r.yaml", "mine"))], "already", "r.yaml", "--force"),
    Case("verb", "recipes, into no folder", lambda w: ["recipes", "copy", "smollm2-135m-lora", str(w.folder / "no" / "r.yaml")], "cannot write", "r.yaml", "mkdir"),
    Case("verb", "fetch, nothing there", lambda w: ["fetch", str(w.folder / "nothing")], "nothing at", "model.name", "Hub id"),
]  # fmt: skip

SCRIPTS = [
    Case("script", "unknown flag", lambda w: w.script("--learnin_rate", "1"), "--learnin_rate", "command line", "--learning_rate"),
    Case("script", "batch of 0", lambda w: w.script("--batch_size", "0"), "not at least 1", "command line", "--help"),
    Case("script", "batch of many", lambda w: w.script("--batch_size", "many"), "many", "command line", "--help"),
    Case("script", "rate of nan", lambda w: w.script("--learning_rate", "nan"), "nan", "command line", "--help"),
    Case("script", "no such model", lambda w: w.script("--model_name", str(w.folder / "no"), name="Llama3_3B_full_finetuning"), "nothing at", "model.name", "Hub id"),
    Case("script", "no such data", lambda w: w.script("--data", str(w.folder / "no.jsonl")), "no such file", "no.jsonl", "did you mean"),
    Case("script", "rows of another shape", lambda w: w.script("--data", str(w.write("r.jsonl", GOOD)), name="Llama3_70B_LoRA_finetuning"), "no column", "r.jsonl:1", "columns:"),
    Case("script", "folder is a file", lambda w: w.script("--output_dir", str(w.write("taken", "mine"))), "cannot be written", "taken", "output_dir"),
    Case("script", "float16 on a CPU", lambda w: w.script("--dtype", "float16"), "fp16", "model.dtype", "bf16"),
    Case("script", "broken weights", lambda w: w.script("--model_name", str(w.model(lambda f: cut(f / "model.safetensors"))), name="Llama3_70B_qLoRA_finetuning"), "damaged", "model.safetensors", "copy the file again"),
    Case("script", "log_dir is a file", lambda w: w.script("--log_dir", str(w.write("events", "mine"))), "TensorBoard", "events", "log"),
]  # fmt: skip

FOLDERS = [
    Case("folder", "output_dir is a file", lambda w: w.train(output_dir=str(w.write("taken", "mine"))), "cannot be written", "taken", "output_dir"),
    Case("folder", "output_dir under a file", lambda w: w.train(output_dir=str(w.write("taken", "mine") / "run")), "cannot be written", "taken", "output_dir"),
    Case("folder", "output_dir in /proc", lambda w: w.train(output_dir="/proc/tunesmith"), "cannot be written", "/proc", "output_dir"),
    Case("folder", "output_dir has too long a name", lambda w: w.train(output_dir=str(w.folder / ("a" * 300))), "too long", "aaa", "mend the path"),
    Case("folder", "output_dir in no one's home", lambda w: w.train("output_dir=~no.one/run"), "no home", "output_dir", "path"),
    Case("folder", "output_dir with a null character", lambda w: w.train('output_dir="a\\0b"'), "null character", "output_dir", "anew"),
    Case("folder", "--fresh where the rows lie", lambda w: w.train("--fresh", output_dir=str(w.folder)), "more than a run", "", "of its own"),
    Case("folder", "TensorBoard under a file", lambda w: w.train(log={"tensorboard": True, "tensorboard_dir": str(w.write("f", "mine") / "tb")}), "TensorBoard", "f/tb", "log.tensorboard"),
]  # fmt: skip
ALL = [*RECIPES, *DATA, *MODELS, *VERBS, *SCRIPTS, *FOLDERS]
