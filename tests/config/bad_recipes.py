"""Recipes that must be refused, each with what the error says, where, and the fix: one table.

A row is (name, recipe text, overrides, in `what`, in `where`, in `fix`). The text's lines count
from 1; BASE is put before a text that begins with "+", and has 3 lines.
"""

from __future__ import annotations

from typing import NamedTuple

BASE = "model: {name: org/model}\noutput_dir: runs/x\ndata: {train: {source: org/rows, format: messages}}\n"


class Bad(NamedTuple):
    name: str
    text: str
    overrides: tuple[str, ...]
    what: str
    where: str
    fix: str

    @property
    def recipe(self) -> str:
        return BASE + self.text[1:] if self.text.startswith("+") else self.text


def _file(name: str, text: str, what: str, where: str, fix: str) -> Bad:
    return Bad(name, text, (), what, where, fix)


def _line(name: str, overrides: str | tuple[str, ...], what: str, where: str, fix: str) -> Bad:
    listed = (overrides,) if isinstance(overrides, str) else overrides
    return Bad(name, "+", listed, what, f"command line{': ' + where if where else ''}", fix)


def _rule(name: str, override: str, what: str, fix: str) -> Bad:
    """A rule broken by one override of the base recipe."""
    return _line(name, override, what, override.partition("=")[0], fix)


_FORM = [
    _file("empty", "", "this file is not a mapping", "r.yaml", "tunesmith recipes"),
    _file("list at the top", "- model\n", "this file is not a mapping", "r.yaml:1", "model:"),
    _file("two documents", "+---\nmethod: sft\n", "YAML", "r.yaml:4", "one YAML document"),
    _file("tab", "model:\n\tname: x\n", "YAML", "r.yaml:2", "indented with spaces"),
    _file("open bracket", "+adapter: {rank: [1\n", "YAML", "r.yaml:5", "correct the text"),
    _file("bad character", "+method: \x07\n", "YAML", "r.yaml:4", ""),
    _file("duplicate key", "+train:\n  seed: 1\n  seed: 2\n", "'seed' is given twice", "r.yaml:6", "remove one"),
    _file("number as key", "+train: {1: 2}\n", "a key must be text", "r.yaml:4", "quotes"),
    _file("unknown alias", "+method: *gone\n", "YAML", "r.yaml:4", "correct the text"),
    _file("alias to itself", "+train: &a {seed: *a}\n", "too deeply nested", "r.yaml:4", "no aliases"),
    _file("tag", "+method: !!python/name:os.system x\n", "tag", "r.yaml:4", "plain value"),
    _file("merge key", "+train: {<<: sft}\n", "YAML 1.2 has no merge key", "r.yaml:4", "extends"),
    _file("too deep", "+train: " + "[" * 40 + "]" * 40 + "\n", "too deeply nested", "r.yaml:4", "fewer levels"),
]  # fmt: skip

_KEYS = [
    _file("no model", "output_dir: x\ndata: {train: {source: a/b}}\n", "model", "r.yaml:1", "add model: {name:"),
    _file("no model name", "model: {dtype: bf16}\noutput_dir: x\ndata: {train: {source: a/b}}\n", "model.name", "r.yaml:1", "add model.name"),
    _file("mistyped key", "+train:\n  learning_rat: 1\n", "train.learning_rat", "r.yaml:5", "did you mean train.learning_rate?"),
    _file("key of another section", "+learning_rate: 1\n", "learning_rate", "r.yaml:4", "did you mean train.learning_rate?"),
    _file("dash", "+train: {weight-decay: 1}\n", "train.weight-decay", "r.yaml:4", "did you mean train.weight_decay?"),
    _file("dotted key", "+train.seed: 1\n", "train.seed", "r.yaml:4", "train: {seed: ...}"),
    _file("nothing near", "+adapter: {zzzzqqq: 1}\n", "adapter.zzzzqqq", "r.yaml:4", "keys of adapter: kind, rank"),
    _file("TRL", "+per_device_train_batch_size: 8\n", "per_device_train_batch_size", "r.yaml:4", "write train.micro_batch"),
    _file("PEFT's list", "+adapter: {target_modules: [q_proj]}\n", "adapter.target_modules", "r.yaml:4", "adapter.target"),
    _file("PEFT's switch", "+model2: {}\nload_in_4bit: false\n", "load_in_4bit (line 5)", "r.yaml:4", "load_in_4bit: write model.quantize: nf4"),
    _file("a share of rows", "+val_set_size: 0.1\n", "val_set_size", "r.yaml:4", "data.hold_out"),
    _file("epochs", "+num_epochs: 4\n", "num_epochs", "r.yaml:4", "train.duration: 3 epochs"),
    _file("two unknown keys", "+train:\n  duraton: 1\nadapter: {lora_r: 4}\n", "adapter.lora_r (line 6), train.duraton (line 5)", "r.yaml:6",
          "adapter.lora_r: write adapter.rank; train.duraton: did you mean train.duration?"),
    _file("a file of Axolotl", "base_model: a/b\ndatasets: [{path: a/c, type: alpaca}]\nadapter: lora\nlora_r: 16\n",
          "base_model (line 1), datasets (line 2), lora_r (line 4)", "r.yaml:1", "tunesmith import r.yaml"),
    _line("override without =", "train.seed", "not of the form", "", "train.learning_rate=2e-4"),
    _line("override of an unknown key", "train.sed=3", "train.sed", "train.sed", "did you mean train.seed?"),
    _line("override below a value", ("train.seed=1", "train.seed.x=3"), "one override sets train.seed, and another override", "train.seed.x", "set train.seed completely"),
    _line("override with broken YAML", "train.betas=[0.9", "YAML", "train.betas", ""),
    _line("extends as an override", "extends=qwen3-8b-lora", "extends is only allowed in a recipe file", "extends", "name the recipe qwen3-8b-lora"),
]  # fmt: skip

_EXTENDS = [
    _file("extends itself", "extends: ./r.yaml\n", "circle", "r.yaml:1", "remove one extends"),
    _file(
        "extends nothing",
        "extends: qwen3-8b-lara\n",
        "neither a file nor a shipped recipe with the name 'qwen3-8b-lara'",
        "r.yaml:1",
        "did you mean qwen3-8b-lora?",
    ),
    _file(
        "extends two",
        "extends: [a, b]\n",
        "must name one recipe or file",
        "r.yaml:1",
        "extends: llama3.1-8b-lora",
    ),
]

_TYPES = [
    _file("quoted truth", '+log: {wandb: "true"}\n', "log.wandb: expected true or false, found \"true\"", "r.yaml:4", "write wandb: true"),
    _line("tracker without a list", "log.trackers=mlflow", "log.trackers: expected a list of texts", "log.trackers", "write it as a list: 'log.trackers=[mlflow]'"),
    _line("unknown tracker", "log.trackers=[mlfow]", "log.trackers.0: expected `mlflow`, `trackio`", "log.trackers", "did you mean mlflow?"),
    _file("quoted number", '+adapter: {rank: "16"}\n', "adapter.rank: expected a whole number", "r.yaml:4", "write rank: 8"),
    _file("fraction", "+adapter: {rank: 8.0}\n", "adapter.rank: expected a whole number, found 8.0", "r.yaml:4", "rank: 8"),
    _file("section as a word", "+adapter: lora\n", "adapter: expected a mapping of keys, found \"lora\"", "r.yaml:4", "adapter"),
    _file("empty section", "+train:\n", "train: expected a mapping of keys, found null", "r.yaml:4", "write train: {}"),
    _file("number as text", "+adapter: {from: 5}\n", "adapter.from: expected text or null, found 5", "r.yaml:4", 'from: "5"'),
    _file("date", "+train: {duration: 2026-01-31}\n", "'2026-01-31' is not a length", "r.yaml:4", "duration: 1 epochs"),
    _line("bare length", "train.duration=3", "train.duration: expected a length, found 3", "train.duration", "'train.duration=3 steps' or 'train.duration=3 epochs'"),
    _line("bare size", "train.global_batch=64", "train.global_batch: expected a size, found 64", "train.global_batch", "64 examples"),
    _line("unknown unit", "train.duration=3 weeks", "is not a length", "train.duration", "train.duration=1 epochs"),
    _line("half an example", "train.global_batch=1.5 examples", "must be a whole number", "train.global_batch", "64 examples"),
    _line("not a number", "train.eps=.nan", "train.eps is nan", "train.eps", "train.eps=1e-08"),
    _line("overflow", "train.learning_rate=1e999", "should be a finite number", "train.learning_rate", "learning_rate=0.0001"),
    _line("huge whole number", "train.seed=" + "9" * 200, "should be less than 4294967296", "train.seed", "train.seed=42"),
    _line("whole number of 5,000 digits", "train.seed=" + "9" * 5000, "expected a whole number, found Infinity", "train.seed", "train.seed=42"),
    _line("5,000 digits as a name", "model.name=" + "9" * 5000, "expected text, found Infinity", "model.name", "in quotes"),
    _line("5,000 digits of steps", f"train.duration={'9' * 5000} steps", "is too large: at most 1,000,000,000 steps", "train.duration", "1 epochs"),
    _line("1e300 examples", "train.global_batch=1e300 examples", "'1e300 examples' is too large: at most 1,000,000,000 examples", "train.global_batch", "64 examples"),
    _line("one beta", "train.betas=[0.9]", "expected a list of 2 numbers, found [0.9]", "train.betas", "[0.9, 0.999]"),
    _line("number among texts", "model.added_tokens=[a, 5]", "model.added_tokens.1: expected text, found 5", "model.added_tokens", '"5"'),
    _file("source as a word", "model: {name: a/b}\noutput_dir: x\ndata: {train: rows.jsonl}\n", "data.train: expected a mapping of keys, or a list of them", "r.yaml:3", "train: {source: rows.jsonl"),
    _file("mistyped key of one source", "model: {name: a/b}\noutput_dir: x\ndata:\n  train:\n    sourc: a/b\n", "data.train.sourc", "r.yaml:5", "did you mean data.train.source?"),
    _file("key of the second source", "model: {name: a/b}\noutput_dir: x\ndata:\n  train:\n  - source: a/b\n  - {source: c/d, wieght: 2}\n", "data.train.1.wieght", "r.yaml:6", "did you mean data.train.weight?"),
    _file("field name of from", "+adapter: {from_: a/b}\n", "adapter.from_", "r.yaml:4", "did you mean adapter.from?"),
    _line("dtype of others", "model.dtype=bfloat16", "model.dtype: expected `auto`, `bf16`, `fp16` or `fp32`", "model.dtype", "'model.dtype=bf16'"),
    _line("compile as truth", "train.compile=true", "train.compile: expected", "train.compile", "'train.compile=on'"),
    _line("QLoRA as a kind", "adapter.kind=qlora", "adapter.kind: expected", "adapter.kind", "qlora is lora with model.quantize: nf4"),
    _line("quantization of others", "model.quantize=gptq", "model.quantize: expected", "model.quantize", "write one of auto, none, fp8, nf4, as-shipped: gptq and other"),
    _line("removed row check", "data.leave_out=[near-duplicates, unfinished]", "data.leave_out.1: expected", "data.leave_out", "write one of near-duplicates, contradictions: unfinished was removed"),
    _line("method of ipo", "method=ipo", "method.name: expected `sft`,", "method", "ipo is dpo with method.loss_type: ipo"),
    _line("micro_batch word", "train.micro_batch=max", "expected a size or `auto`", "train.micro_batch", "write one of auto"),
    _line("columns value", "data.train.columns={messages: 3}", "data.train.columns.messages: expected text", "data.train.columns", '"3"'),
]  # fmt: skip

_PATHS = [
    _rule("variable", "output_dir=$SCRATCH/x", "must be a path or a Hub id", "command line"),
    _rule(
        "URL of a model",
        "model.name=https://huggingface.co/org/model",
        "or a Hub id",
        "write the Hub id: org/model",
    ),
    _rule("URL of data", "data.train.source=https://x.org/rows.jsonl", "or a Hub id", "downloaded"),
    _rule("empty name", "model.name=''", 'expected text, found ""', "write 'model.name="),
    _rule("no such template", "data.template=alpacca", "does not exist", "did you mean alpaca?"),
    _rule(
        "no such template file", "data.template=notes.jinja", "does not exist", "data.template=auto"
    ),
]

_RULES = [
    _line("fp8 beside fp32", ("model.quantize=fp8", "model.dtype=fp32"), "model.quantize is fp8, but model.dtype is fp32", "model.quantize", "model.dtype=bf16"),
    _rule("recompute below 0", "train.recompute=-1", "train.recompute is -1", "train.recompute=auto"),
    _line("quantised full", ("adapter.kind=none", "model.quantize=nf4"), "model.quantize is nf4, but adapter.kind is none", "model.quantize", "model.quantize=none"),
    _line("rank without adapter", ("adapter.kind=none", "adapter.rank=4"), "adapter.rank", "adapter.rank", "remove adapter.rank"),
    _line("adapter.from without adapter", ("adapter.from=org/adapter", "adapter.kind=none"), "adapter.from", "adapter.from", "adapter.kind=lora"),
    _file("saved modules without adapter", "+adapter:\n  kind: none\n  modules_to_save: [lm_head]\n", "adapter.modules_to_save", "r.yaml:6", "remove"),
    _rule("rank 0", "adapter.rank=0", "adapter.rank is 0", "adapter.rank=8"),
    _rule("rank of 64 bits", "adapter.rank=9223372036854775807", "less than 2147483648", "adapter.rank=8"),
    _rule("dropout 1", "adapter.dropout=1", "adapter.dropout is 1", "adapter.dropout=0.0"),
    _rule("target mistyped", "adapter.target=all_linear", "is all_linear, which is not the name of a module", "all-linear"),
    _rule("target empty", "adapter.target=[]", "is not the name of a module", "all-linear"),
    _rule("all-linear in a list", "adapter.target=[all-linear, lm_head]", "is not the name of a module", "adapter.target=all-linear"),
    _rule("added tokens untrained", "model.added_tokens=['<|x|>']", "needs trained embeddings", "modules_to_save=[embed_tokens"),
    _rule("added token twice", "model.added_tokens=[a, a]", "repeated token", "once"),
    _rule("no rows", "data.train=[]", "data.train is empty", "data.train={source:"),
    _line("column of another format", "data.train.columns={instruction: question}", "columns.instruction", "data.train.columns", "the format's columns: messages, system, tools"),
    _line("column mistyped", "data.train.columns={mesages: m}", "columns.mesages", "data.train.columns", "did you mean messages?"),
    _line("columns the wrong way round", "data.train.columns={dialogue: messages}", "columns.dialogue", "data.train.columns", "the format's columns: messages, system, tools"),
    _line("system on plain text", ("data.train.format=text", "data.system=Be kind."), "data.system has no effect on rows of format text", "data.system", "remove the key"),
    _line("raw for conversations", "data.template=raw", "data.template is raw, which cannot write the turns of format messages", "data.template", "prompt-completion"),
    _rule("duration in %", "train.duration=3 %", "train.duration is 3 %, but its unit must be one of steps, epochs", "train.duration=1 epochs"),
    _rule("warm-up by the clock", "train.warmup=3 min", "must be one of %, steps, epochs", "train.warmup=3 %"),
    _rule("warm-up of 200 %", "train.warmup=200 %", "longer than train.duration of 1 epochs", "train.warmup=3 %"),
    _line("warm-up too long", ("train.duration=50 steps", "train.warmup=100 steps"), "longer than train.duration of 50 steps", "train.warmup", "train.warmup=3 %"),
    _rule("small token batch", "train.global_batch=1024 tokens", "smaller than one row of data.seq_len 2048", "2048 tokens"),
    _line("token batch unpacked", ("train.global_batch=8192 tokens", "data.pack=false"), "needs packed rows", "train.global_batch", "data.pack=true"),
    _rule("small micro batch", "train.micro_batch=512 tokens", "smaller than one row of data.seq_len 2048", "2048 tokens"),
    _rule("micro above global", "train.micro_batch=128 examples", "larger than train.global_batch of 64 examples", "auto"),
    _line("pairs for sft", "data.train.format=preference", "data.train.format is preference, a row format that method sft cannot use", "data.train.format", "method=dpo"),
    Bad("answers for dpo", "+", ("method=dpo",), "data.train.format is messages, a row format that method dpo cannot use", "r.yaml:3", "set method: sft, or use rows of format preference"),
    _line("feedback for dpo", ("method=dpo", "data.train.format=feedback"), "format is feedback, a row format that method dpo", "data.train.format", "method=kto"),
    _line("beta of sft", "method.beta=0.2", "method.beta has no effect with method: sft", "method.beta", "dpo or orpo or kto or simpo"),
    _line("beta 0", "method={name: dpo, beta: 0}", "method.beta is 0: input should be greater than 0", "method", "beta"),
    _line("a margin for dpo", ("method.name=dpo", "method.simpo_gamma=1"), "method.simpo_gamma has no effect with method: dpo", "method.simpo_gamma", "simpo"),
    _line("smoothing without robust", ("method.name=dpo", "method.label_smoothing=0.1"), "no effect with method.loss_type: sigmoid", "method.label_smoothing", "robust"),
    _line("robust without smoothing", ("method.name=dpo", "method.loss_type=robust"), "is robust, but method.label_smoothing is 0", "method.loss_type", "label_smoothing=0.1"),
    _line("smoothing of half", ("method.name=dpo", "method.label_smoothing=0.5"), "method.label_smoothing is 0.5: input should be less than 0.5", "method.label_smoothing", "0.0"),
    _line("kto in full by the clock", ("method=kto", "data.train.format=feedback", "adapter.kind=none", "train.duration=1 h"), "full fine-tuning with kto needs a duration in steps or epochs", "train.duration", "adapter.kind=lora"),
    _line("a list of methods", "method=[dpo]", "method: expected a mapping of keys, found [\"dpo\"]", "method", "method={name: dpo}"),
    _line("a method of nothing", "method=null", "method: expected a mapping of keys, found null", "method", "method={name: dpo}"),
    _line("beta in words", "method={name: dpo, beta: low}", "method.beta: expected a number, found \"low\"", "method", "method.beta=0.1"),
    _line("beta without end", "method={name: dpo, beta: 1e400}", "method.beta is inf: input should be a finite number", "method", "method.beta=0.1"),
    _line("another loss", ("method.name=dpo", "method.loss_type=apo_zero"), "found \"apo_zero\"", "method.loss_type", "sigmoid"),
    _line("a key of another tool", "method={name: dpo, rpo_alpha: 1}", "unknown key method.rpo_alpha", "method", "method.sft_weight"),
    _line("pairs for kto", ("method=kto", "data.train.format=preference"), "format is preference, a row format that method kto", "data.train.format", "method=dpo"),
    _line("kto of one", ("method=kto", "train.global_batch=1 examples"), "kto needs at least two", "train.global_batch", "16 examples"),
    _line("accuracy of sft", "validate.best_by=accuracy", "a score that method sft does not compute", "validate.best_by", "loss"),
    _line("a pair in a small batch", ("method=dpo", "data.train.format=preference", "train.global_batch=2048 tokens"), "smaller than one pair", "train.global_batch", "4096 tokens"),
    _rule("rate below 0", "train.min_learning_rate=-1", "train.min_learning_rate is -1", "train.min_learning_rate=0.0"),
    _rule("least rate above the rate", "train.min_learning_rate=1", "is 1.0, but train.learning_rate is", "smaller"),
    _line("least rate of a constant", ("train.schedule=constant", "train.min_learning_rate=1e-6"), "no effect with train.schedule: constant", "train.min_learning_rate", "cosine"),
    _rule("beta 1", "train.betas=[0.9, 1]", "train.betas.1 is 1", "train.betas=[0.9, 0.999]"),
    _rule("seed below 0", "train.seed=-1", "train.seed is -1", "train.seed=42"),
    _rule("stochastic rounding of an adapter", "train.master_weights=stochastic", "trains no bf16 parameters", "adapter.kind=none"),
    _line("in the backward, clipped", ("adapter.kind=none", "train.optimizer_in_backward=true"), "cannot be combined with train.clip_norm: 1.0", "train.optimizer_in_backward", "train.clip_norm"),
    _line("in the backward of an adapter", ("train.clip_norm=null", "train.optimizer_in_backward=true"), "cannot be combined with adapter.kind: lora", "train.optimizer_in_backward", "false"),
    _line("in the backward, in fp16", ("adapter.kind=none", "train.clip_norm=null", "model.dtype=fp16", "train.optimizer_in_backward=true"), "cannot be combined with model.dtype: fp16", "train.optimizer_in_backward", "model.dtype"),
    _line("in the backward, accumulated", ("adapter.kind=none", "train.clip_norm=null", "train.micro_batch=8 examples", "train.optimizer_in_backward=true"), "cannot be combined with train.micro_batch: 8 examples", "train.optimizer_in_backward", "train.micro_batch"),
    _rule("patience without rows", "validate.patience=3", "needs data.validation", "add data.validation"),
    _line("share of a timed run", ("train.duration=1 h", "checkpoint.every=10 %"), "checkpoint.every is 10 %", "checkpoint.every", "200 steps"),
    _rule("never checkpoint", "checkpoint.every=0 steps", "must be above 0", "200 steps"),
]  # fmt: skip

BAD_RECIPES = [*_FORM, *_KEYS, *_EXTENDS, *_TYPES, *_PATHS, *_RULES]
