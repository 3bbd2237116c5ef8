"""The recipe as frozen, typed dataclasses: every key, its type, its default and its documentation.

`load.py` fills these from YAML and the command line, `check.py` holds the rules that span several keys, and
`describe.py` prints the reference page from the `doc` of each key. Nothing here imports torch.

A field's type is the whole of its form: `Literal` fields take the listed words, `Length` and `Size` fields take
text in the grammar of `tunesmith.units`, `X | None` takes `null`. There is no coercion: `pack: "true"` is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tunesmith.units import Length, Size


def key(default: Any = ..., *, doc: str, factory: Any = None) -> Any:
    """A recipe key: a dataclass field that carries its documentation; no default means that it must be given."""
    meta = {"doc": doc}
    if factory is not None:
        return field(default_factory=factory, metadata=meta)
    return field(metadata=meta) if default is ... else field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The base model."""

    name: str = key(doc="Hub id (`meta-llama/Llama-3.1-8B-Instruct`), a local folder, or a `.gguf` file")
    revision: str | None = key(None, doc="branch, tag or commit on the Hub; null takes `main`")
    tokenizer: str | None = key(None, doc="Hub id or folder of another tokenizer; null takes the model's own")
    dtype: Literal["bf16", "fp16", "fp32"] = key(
        "bf16", doc="type of the weights and of the products; fp16 scales the loss"
    )
    quantize: Literal["none", "fp8", "nf4"] = key(
        "none", doc="how the frozen base is held; fp8 for speed (needs bf16), nf4 (bitsandbytes' format) for memory"
    )
    attention: Literal["auto", "eager"] = key(
        "auto", doc="auto takes the fastest block-diagonal attention; eager is Transformers' own plain one"
    )
    trust_remote_code: bool = key(False, doc="run Python code that the model's repository ships")
    added_tokens: tuple[str, ...] = key(
        (), doc="special tokens to add to the vocabulary; with LoRA, `adapter.modules_to_save` must name `embed_tokens`"
    )
    pad_token: str | None = key(None, doc="padding token; null takes the tokenizer's own, else its unk, else its eos")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What is trained: a LoRA adapter, or with `kind: none` every weight."""

    kind: Literal["lora", "none"] = key("lora", doc="lora, or none for full fine-tuning")
    rank: int = key(8, doc="LoRA's r")
    alpha: float = key(16.0, doc="LoRA's alpha; the update is scaled by alpha / rank")
    dropout: float = key(0.0, doc="dropout before A, from 0 up to below 1")
    target: str | tuple[str, ...] = key(
        "all-linear", doc="`all-linear` (every linear layer but the head) or a list of module names"
    )
    rslora: bool = key(False, doc="scale by alpha / sqrt(rank), as rsLoRA does")
    modules_to_save: tuple[str, ...] = key(
        (), doc="modules trained in full beside the adapter, such as `embed_tokens`, `lm_head`"
    )
    from_: str | None = key(None, doc="folder or Hub id of a PEFT adapter to go on from")  # written `from` in a recipe


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of rows: a Hub dataset or a local file."""

    source: str = key(doc="Hub id, or a file: json, jsonl, csv, parquet, arrow")
    name: str | None = key(None, doc="configuration of a Hub dataset")
    revision: str | None = key(None, doc="branch, tag or commit of a Hub dataset")
    split: str | None = key(None, doc="such as `train` or `train[:95%]`; null takes all rows")
    format: Literal["alpaca", "messages", "sharegpt", "prompt-completion", "text"] = key(
        "messages", doc="what a row looks like"
    )
    columns: dict[str, str] = key(factory=dict, doc="the format's name of a column: the file's name of it")
    max_examples: int | None = key(None, doc="take the first N rows of the split")
    weight: float = key(1.0, doc="among several sources: how many times this one is seen in an epoch")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Rows, and how they become tokens."""

    train: tuple[Source, ...] = key(doc="a source, or a list of them")
    validation: tuple[Source, ...] = key((), doc="held-out rows: a source, a list of them, or null")
    template: str = key(
        "auto", doc="`auto` (the tokenizer's chat template, else alpaca), `chat`, `alpaca`, or a Jinja file"
    )
    system: str | None = key(None, doc="system message for rows that have none")
    seq_len: int = key(2048, doc="longest example, in tokens; also the length of a packed row")
    pack: bool = key(True, doc="several examples a row, none seeing another; false: one example a row, padded")
    train_on: Literal["response", "last", "all"] = key(
        "response", doc="tokens that carry loss: every assistant turn, the last one, or all"
    )
    too_long: Literal["truncate", "drop", "error"] = key(
        "truncate", doc="what happens to a longer example; it is counted"
    )
    shuffle: bool = key(True, doc="draw a new order each epoch from the seed; false keeps the order of the file")


@dataclass(frozen=True, kw_only=True)
class Train:
    """The optimizer and its course."""

    duration: Length = key(Length(1, "epochs"), doc="`1 epochs`, `500 steps` or `2 h`")
    global_batch: Size = key(
        Size(64, "examples"), doc="what one optimizer step learns from, over all ranks: examples or tokens"
    )
    micro_batch: Size | Literal["auto"] = key(
        "auto", doc="what one rank takes in one forward pass: tokens (padding counted) or examples"
    )
    learning_rate: float = key(1e-4, doc="peak learning rate")
    min_learning_rate: float = key(0.0, doc="where linear and cosine end")
    schedule: Literal["constant", "linear", "cosine"] = key(
        "cosine", doc="course of the learning rate after the warm-up"
    )
    warmup: Length = key(Length(3, "%"), doc="share of the run, or steps, with a rising learning rate")
    optimizer: Literal["adamw", "adamw-8bit"] = key(
        "adamw", doc="AdamW; adamw-8bit holds both moments in 8 bits, a scale a block (bitsandbytes)"
    )
    optimizer_in_backward: bool = key(
        False,
        doc="update each parameter inside the backward and drop its gradient: full fine-tuning in less memory; "
        "needs `clip_norm: null`, and takes the global batch in one forward pass",
    )
    betas: tuple[float, float] = key((0.9, 0.999), doc="AdamW's betas")
    eps: float = key(1e-8, doc="AdamW's epsilon")
    weight_decay: float = key(
        0.0, doc="AdamW's decoupled weight decay, on matrices; never on norms, biases and scalars"
    )
    clip_norm: float | None = key(1.0, doc="largest L2 norm of the gradient; null: no clipping")
    master_weights: Literal["fp32", "stochastic"] = key(
        "fp32", doc="full fine-tuning in bf16: an fp32 copy of the weights, or stochastic rounding"
    )
    seed: int = key(42, doc="fixes the order of the data, new weights and dropout")
    recompute: int | Literal["auto", "none", "full"] = key(
        "auto", doc="run the forward of layers again in the backward, to save memory: as few as must be, or this many"
    )
    compile: Literal["auto", "on", "off"] = key("auto", doc="torch.compile")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How ranks share the work; nothing here changes what is learnt."""

    replicate: int | Literal["auto"] = key("auto", doc="copies of the model that each take a part of the batch")
    shard: int | Literal["auto"] = key("auto", doc="ranks that one copy is spread over")
    tensor: int = key(1, doc="ranks that one layer is cut over")


@dataclass(frozen=True, kw_only=True)
class Validate:
    """Loss on the held-out rows."""

    every: Length | None = key(Length(100, "steps"), doc="how often; also done at the end; null: at the end only")
    max_examples: int | None = key(None, doc="take the first N held-out examples")
    patience: int | None = key(None, doc="stop after N validations without a better loss")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is kept on the way, and how a run goes on."""

    every: Length | None = key(Length(200, "steps"), doc="how often; null: only at the end and when stopped")
    keep: int = key(3, doc="how many of the newest to keep")
    resume: Literal["auto", "never", "force"] = key(
        "auto", doc="go on from the newest whole one; never: start over; force: go on although the recipe differs"
    )


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is shown and written while training."""

    every: Length = key(Length(1, "steps"), doc="how often a line is printed; metrics.jsonl has every step")
    tensorboard: bool = key(True, doc="write TensorBoard events")
    tensorboard_dir: str | None = key(
        None, doc="folder of the TensorBoard events; null takes `tensorboard/` in output_dir"
    )
    wandb: bool = key(False, doc="send to Weights & Biases, set up by its own WANDB_ variables")
    samples: int = key(2, doc="sample generations written to TensorBoard at each validation; 0: none")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Traces for Perfetto and TensorBoard, and a memory snapshot."""

    enabled: bool = key(False, doc="record a trace and a memory snapshot")
    wait: int = key(5, doc="steps before a cycle")
    warmup: int = key(3, doc="steps that are traced and thrown away")
    active: int = key(20, doc="steps that are kept")
    cycles: int = key(1, doc="how many times")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One resolved recipe: all that a run is."""

    method: Literal["sft"] = key("sft", doc="supervised fine-tuning")
    model: Model = key(doc="the base model")
    adapter: Adapter = key(Adapter(), doc="what is trained")
    data: Data = key(doc="rows, and how they become tokens")
    train: Train = key(Train(), doc="the optimizer and its course")
    parallel: Parallel = key(Parallel(), doc="how ranks share the work")
    validate: Validate = key(Validate(), doc="loss on held-out rows")
    checkpoint: Checkpoint = key(Checkpoint(), doc="what is kept on the way")
    log: Log = key(Log(), doc="what is shown and written")
    profile: Profile = key(Profile(), doc="traces and a memory snapshot")
    output_dir: str = key(doc="the run directory")
