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
    _file("two documents", "+---\nmethod: sft\n", "YAML", "r.yaml:4", "one YAML document"),
    _file("duplicate key", "+train:\n  seed: 1\n  seed: 2\n", "'seed' is given twice", "r.yaml:6", "remove one"),
    _file("alias to itself", "+train: &a {seed: *a}\n", "too deeply nested", "r.yaml:4", "no aliases"),
    _file("tag", "+method: !!python/name:os.system x\n", "tag", "r.yaml:4", "plain value"),
    _file("merge key", "+train: {<<: sft}\n", "unknown key train.<<", "r.yaml:4", "extends: RECIPE, because YAML 1.2 has no merge key"),
]  # fmt: skip

_KEYS = [
    _file("no model", "output_dir: x\ndata: {train: {source: a/b}}\n", "model", "r.yaml:1", "add model: {name:"),
    _file("mistyped key", "+train:\n  learning_rat: 1\n", "train.learning_rat", "r.yaml:5", "did you mean train.learning_rate?"),
    _file("dotted key", "+train.seed: 1\n", "train.seed", "r.yaml:4", "train: {seed: ...}"),
    _file("TRL", "+per_device_train_batch_size: 8\n", "per_device_train_batch_size", "r.yaml:4", "write train.micro_batch"),
    _file("PEFT's switch", "+model2: {}\nload_in_4bit: false\n", "unknown key load_in_4bit", "r.yaml:5", "write model.quantize: nf4"),
    _file("a file of Axolotl", "base_model: a/b\ndatasets: [{path: a/c, type: alpaca}]\nadapter: lora\nlora_r: 16\n",
          "base_model (line 1), datasets (line 2), lora_r (line 4)", "r.yaml:1", "tunesmith import r.yaml"),
    _line("override of an unknown key", "train.sed=3", "train.sed", "train.sed", "did you mean train.seed?"),
    _line("override below a value", ("train.seed=1", "train.seed.x=3"), "train.seed: expected a whole number", "train.seed", "train.seed=42"),
    _line("extends as an override", "extends=qwen3-8b-lora", "extends is only allowed in a recipe file", "extends", "name the recipe qwen3-8b-lora"),
]  # fmt: skip

_EXTENDS = [
    _file("extends itself", "extends: ./r.yaml\n", "circle", "r.yaml:1", "remove one extends"),
    _file("extends nothing", "extends: qwen3-8b-lara\n", "neither a file nor a shipped recipe with the name 'qwen3-8b-lara'", "r.yaml:1", "did you mean qwen3-8b-lora?"),
]  # fmt: skip

_TYPES = [
    _file("quoted truth", '+log: {wandb: "true"}\n', "log.wandb: expected true or false, found \"true\"", "r.yaml:4", "write wandb: true"),
    _line("unknown tracker", "log.trackers=[mlfow]", "log.trackers.0: expected `mlflow`, `trackio`", "log.trackers", "did you mean mlflow?"),
    _file("fraction", "+adapter: {rank: 8.0}\n", "adapter.rank: expected a whole number, found 8.0", "r.yaml:4", "rank: 8"),
    _line("half an example", "train.global_batch=1.5 examples", "must be a whole number", "train.global_batch", "64 examples"),
    _line("not a number", "train.eps=.nan", "train.eps is nan", "train.eps", "train.eps=1e-08"),
    _line("huge whole number", "train.seed=" + "9" * 200, "should be less than 4294967296", "train.seed", "train.seed=42"),
    _line("1e300 examples", "train.global_batch=1e300 examples", "'1e300 examples' is too large: at most 1,000,000,000 examples", "train.global_batch", "64 examples"),
    _line("one beta", "train.betas=[0.9]", "expected a list of 2 numbers, found [0.9]", "train.betas", "[0.9, 0.999]"),
    _file("key of the second source", "model: {name: a/b}\noutput_dir: x\ndata:\n  train:\n  - source: a/b\n  - {source: c/d, wieght: 2}\n", "data.train.1.wieght", "r.yaml:6", "did you mean data.train.weight?"),
    _line("method of ipo", "method=ipo", "method.name: expected `sft`,", "method", "ipo is dpo with method.loss_type: ipo"),
]  # fmt: skip

_PATHS = [
    _rule("variable", "output_dir=$SCRATCH/x", "must be a path or a Hub id", "command line"),
    _rule("URL of a model", "model.name=https://huggingface.co/org/model", "or a Hub id", "write the Hub id: org/model"),
    _rule("no such template", "data.template=alpacca", "does not exist", "did you mean alpaca?"),
]  # fmt: skip

_RULES = [
    _line("fp8 beside fp32", ("model.quantize=fp8", "model.dtype=fp32"), "model.quantize is fp8, but model.dtype is fp32", "model.quantize", "model.dtype=bf16"),
    _line("quantised full", ("adapter.kind=none", "model.quantize=nf4"), "model.quantize is nf4, but adapter.kind is none", "model.quantize", "model.quantize=none"),
    _line("rank without adapter", ("adapter.kind=none", "adapter.rank=4"), "adapter.rank", "adapter.rank", "remove adapter.rank"),
    _rule("rank 0", "adapter.rank=0", "adapter.rank is 0", "adapter.rank=8"),
    _rule("target mistyped", "adapter.target=all_linear", "is all_linear, which is not the name of a module", "all-linear"),
    _rule("added tokens untrained", "model.added_tokens=['<|x|>']", "needs trained embeddings", "modules_to_save=[embed_tokens"),
    _rule("no rows", "data.train=[]", "data.train is empty", "data.train={source:"),
    _line("column of another format", "data.train.columns={instruction: question}", "columns.instruction", "data.train.columns", "the format's columns: messages, system, tools"),
    _line("system on plain text", ("data.train.format=text", "data.system=Be kind."), "data.system has no effect on rows of format text", "data.system", "remove the key"),
    _rule("duration in %", "train.duration=3 %", "train.duration is 3 %, but its unit must be one of steps, epochs", "train.duration=1 epochs"),
    _line("warm-up too long", ("train.duration=50 steps", "train.warmup=100 steps"), "longer than train.duration of 50 steps", "train.warmup", "train.warmup=3 %"),
    _rule("small token batch", "train.global_batch=1024 tokens", "smaller than one row of data.seq_len 2048", "2048 tokens"),
    _line("token batch unpacked", ("train.global_batch=8192 tokens", "data.pack=false"), "needs packed rows", "train.global_batch", "data.pack=true"),
    _rule("small micro batch", "train.micro_batch=512 tokens", "smaller than one row of data.seq_len 2048", "2048 tokens"),
    _rule("micro above global", "train.micro_batch=128 examples", "larger than train.global_batch of 64 examples", "auto"),
    _line("pairs for sft", "data.train.format=preference", "data.train.format is preference, a row format that method sft cannot use", "data.train.format", "method=dpo"),
    Bad("answers for dpo", "+", ("method=dpo",), "data.train.format is messages, a row format that method dpo cannot use", "r.yaml:3", "set method: sft, or use rows of format preference"),
    _line("beta 0", "method={name: dpo, beta: 0}", "method.beta is 0, but must be above 0", "method", "beta"),
    _line("kto in full by the clock", ("method=kto", "data.train.format=feedback", "adapter.kind=none", "train.duration=1 h"), "full fine-tuning with kto needs a duration in steps or epochs", "train.duration", "adapter.kind=lora"),
    _line("kto of one", ("method=kto", "train.global_batch=1 examples"), "kto needs at least two", "train.global_batch", "16 examples"),
    _line("grpo, weights", ("method={name: grpo, reward_weights: [1, 2]}",), "has 2 values, but method.reward has 1", "method", "one weight"),
    _line("sft, rows without answers", ("data.train.format=prompt",), "is prompt, a row format that method sft cannot use", "data.train.format", "method=grpo"),
    _line("grpo, all answers", ("method=grpo", "data.train_on=all"), "answers the last question", "data.train_on", "last"),
    _line("grpo, penalty in full", ("method={name: grpo, beta: 0.1}", "adapter.kind=none"), "not available in full fine-tuning", "method", "lora"),
    _line("grpo, tensor", ("method=grpo", "parallel.tensor=2"), "does not support tensor parallelism", "parallel.tensor", "1"),
    _line("grpo, pictures", ("method=grpo", "model.vision=true"), "does not support pictures", "model.vision", "false"),
    _line("grpo, offload", ("method=grpo", "train.cpu_offload=[parameters]"), "too slow for the sampling", "train.cpu_offload", "remove"),
    _line("grpo, tokens", ("method=grpo", "train.global_batch=8192 tokens"), "a batch is a number of prompts", "train.global_batch", "16 examples"),
    _line("grpo, long answers", ("method={name: grpo, answer_tokens: 2048}",), "leaves no token of data.seq_len 2048", "method", "4096"),
    _line("grpo on texts", ("method=grpo", "data.train.format=text"), "is text, which has no prompt", "data.train.format", "prompt-completion"),
    _rule("best reward of sft", "validate.best_by=reward", "a score that method sft does not compute", "loss"),
    _rule("least rate above the rate", "train.min_learning_rate=1", "is 1.0, but train.learning_rate is", "smaller"),
    _line("least rate of a constant", ("train.schedule=constant", "train.min_learning_rate=1e-6"), "no effect with train.schedule: constant", "train.min_learning_rate", "cosine"),
    _rule("all held out", "data.hold_out=100 %", "must be above 0 % and below 100 %", "'data.hold_out=5 %'"),
    _line("raw turns of validation", ("data.template=raw", "data.train.format=text", "data.validation={source: a/b, format: messages}"), "cannot write the turns", "data.template", "data.template=auto"),
    _rule("warm-up by the clock", "train.warmup=3 min", "its unit must be one of %, steps, epochs", "'train.warmup=3 %'"),
    _line("weights below 0", ("method={name: grpo, reward_weights: [-1]}",), "has no weight above 0", "method", "a weight above 0"),
    _rule("seed below 0", "train.seed=-1", "train.seed is -1", "train.seed=42"),
    _rule("stochastic rounding of an adapter", "train.master_weights=stochastic", "trains no bf16 parameters", "adapter.kind=none"),
    _line("in the backward, clipped", ("adapter.kind=none", "train.optimizer_in_backward=true"), "cannot be combined with train.clip_norm: 1.0", "train.optimizer_in_backward", "train.clip_norm"),
    _line("in the backward, accumulated", ("adapter.kind=none", "train.clip_norm=null", "train.micro_batch=8 examples", "train.optimizer_in_backward=true"), "cannot be combined with train.micro_batch: 8 examples", "train.optimizer_in_backward", "train.micro_batch"),
    _rule("patience without rows", "validate.patience=3", "needs data.validation", "add data.validation"),
    _line("share of a timed run", ("train.duration=1 h", "checkpoint.every=10 %"), "checkpoint.every is 10 %", "checkpoint.every", "200 steps"),
]  # fmt: skip

BAD_RECIPES = [*_FORM, *_KEYS, *_EXTENDS, *_TYPES, *_PATHS, *_RULES]
