"""The recipe as frozen, typed dataclasses: every key, its type, its bounds, its default and its
documentation.

`typed.py` builds these from YAML and the command line with pydantic, `check.py` holds the rules
that span several keys, and `describe.py` prints the reference page. Nothing here imports torch.

The type of a field is all that it accepts: `Literal` fields take the listed words, `Length`, `Size`
and `Share` fields take text in the grammar of `tunesmith.units`, `X | None` takes `null`. There is
no coercion: `pack: "true"` is refused.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Interval, MinLen

from tunesmith.config.row_formats import FormatName
from tunesmith.units import Length, Share, Size

# A name, a path or a branch; only a system message may be empty.
Text = Annotated[str, MinLen(1)]
Count = Annotated[int, Interval(ge=1, lt=2**63)]
# Times a layer's width it is a size that torch can hold.
Rank = Annotated[int, Interval(ge=1, lt=2**31)]
AtLeastTwo = Annotated[int, Interval(ge=2, lt=2**63)]
CountOrZero = Annotated[int, Interval(ge=0, lt=2**63)]
Positive = Annotated[float, Gt(0)]
PositiveOrZero = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, lt=1)]
Seed = Annotated[int, Interval(ge=0, lt=2**32)]
# Those of accelerate whose runs can be continued; metrics/trackers.py says how.
TrackerName = Literal["mlflow", "trackio", "comet_ml", "swanlab", "wandb"]

Dtype = Literal["bf16", "fp16", "fp32"]
StatedDtype = Literal["auto", "bf16", "fp16", "fp32"]
Quantize = Literal["auto", "none", "fp8", "nf4", "as-shipped"]
# Minimum size of a batch that is proposed for kto, in examples. Its reference point is a mean over
# the prompts of a batch, each with the answer to another prompt.
MIN_KTO_BATCH = 4
# What `data.leave_out` may name; data/compare/row_checks.py finds it.
RowFault = Literal["near-duplicates", "contradictions"]
MethodName = Literal["sft", "dpo", "orpo", "kto", "simpo"]

# Methods whose examples are pairs of answers.
PAIR_METHODS = ("dpo", "orpo", "simpo")
# The keys below `method` that each method reads beside its name; those of the others are refused.
METHOD_KEYS: dict[str, tuple[str, ...]] = {
    "sft": (),
    "dpo": ("beta", "loss_type", "label_smoothing", "sft_weight"),
    "orpo": ("beta",),
    "kto": ("beta", "desirable_weight", "undesirable_weight"),
    "simpo": ("beta", "simpo_gamma"),
}


def key(
    default: Any,
    doc: str,
    *,
    example: str = "",
    free: bool = False,
) -> Any:
    """Declare a recipe key: all that belongs to it but its type and its effect.

    Args:
        default: of the key; `...`: it is required, and has an example.
        free: whether it may change when a run resumes, as it changes no step; so may the keys
            below it.
    """
    metadata = {"doc": doc, "example": example, "free": free}
    if default is ...:
        return field(metadata=metadata)
    if default == {}:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def yaml_name(name: str) -> str:
    """A field's name as a recipe writes it: `from_` is written `from`."""
    return name.removesuffix("_")


def is_section(hint: Any) -> bool:
    """Tell whether a type is one of the dataclasses below, not a value such as `Length`."""
    return isinstance(hint, type) and hint.__module__ == __name__


# With fewer, the learning rate is mostly in its warm-up and the model changes little.
FEW_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What the loss is; the names and defaults of the numbers are TRL's."""

    name: MethodName = key(
        "sft",
        "sft: supervised fine-tuning; from pairs of a good and a bad answer: dpo, orpo, simpo; from"
        " answers labeled good or bad: kto",
    )
    beta: Positive = key(
        0.1,
        "dpo, kto: strength of the KL penalty to the reference; orpo: weight of the odds ratio;"
        " simpo: scale of the margin",
    )
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust"] = key(
        "sigmoid",
        "dpo: loss on a pair's margin; robust: for partly wrong labels",
    )
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = key(
        0.0, "dpo, loss_type robust: the assumed share of pairs with swapped answers"
    )
    sft_weight: PositiveOrZero = key(
        0.0, "dpo: weight of the cross-entropy of the chosen answer, added to the loss"
    )
    desirable_weight: PositiveOrZero = key(1.0, "kto: weight of good answers")
    undesirable_weight: PositiveOrZero = key(1.0, "kto: weight of bad answers")
    simpo_gamma: PositiveOrZero = key(
        0.5, "simpo: target margin between the chosen and the rejected answer"
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """The base model."""

    name: Text = key(
        ...,
        "Hub id, a local folder, a `.gguf` file, or `demo`",
        example="meta-llama/Llama-3.1-8B-Instruct",
    )
    revision: Text | None = key(None, "branch, tag or commit on the Hub; null: `main`")
    tokenizer: Text | None = key(None, "Hub id or folder of a tokenizer; null: the model's")
    dtype: StatedDtype = key(
        "auto",
        "dtype of weights and matmuls; fp16 scales the loss; auto: bf16 where the processor has"
        " units for it, else fp32 if the weights fit",
    )
    quantize: Quantize = key(
        "auto",
        "quantization of the frozen base: none, fp8 for speed (needs bf16; on Hopper, Ada and"
        " Blackwell GPUs), nf4 (bitsandbytes' format) for memory, as-shipped: the codes and scales"
        " of a base that ships in FP8, NVFP4 or MXFP4; auto: as-shipped for such a base, none for"
        " others",
    )
    attention: Literal["auto", "eager"] = key(
        "auto",
        "auto: the fastest for packed rows; eager: Transformers' implementation",
        free=True,
    )
    vision: bool = key(
        False,
        "build the vision part of a vision-language model too, frozen: rows may have pictures;"
        " false: its text model alone",
    )
    train_projector: bool = key(
        False,
        "with `vision`: also train, in full, what turns features of pictures into those of tokens",
    )
    trust_remote_code: bool = key(
        False,
        "run Python code from the model's repository; accepted in your own recipe and on the"
        " command line, not in a run directory or in a recipe of another folder that you extend",
    )
    added_tokens: tuple[Text, ...] = key(
        (), "special tokens to add; with LoRA, `modules_to_save` must name `embed_tokens`"
    )
    pad_token: Text | None = key(
        None, "padding token; null: the tokenizer's pad token, else unk, else eos"
    )


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What is trained: a LoRA adapter, or with `kind: none` all weights."""

    kind: Literal["lora", "none"] = key(
        "lora",
        "lora, or none for full fine-tuning",
    )
    rank: Rank = key(
        8,
        "LoRA rank (r)",
    )
    alpha: Positive = key(16.0, "LoRA alpha; the update is scaled by alpha / rank")
    dropout: Fraction = key(0.0, "dropout on the input of A, at least 0 and below 1")
    target: Text | tuple[Text, ...] = key(
        "all-linear",
        "`all-linear` (linear layers but the head, and experts) or a list of module names",
    )
    rslora: bool = key(
        False,
        "scale by alpha / sqrt(rank), as rsLoRA does",
    )
    modules_to_save: tuple[Text, ...] = key(
        (), "modules trained in full, such as `embed_tokens`, `lm_head`"
    )
    # `from` in a recipe.
    from_: Text | None = key(None, "run, folder or Hub id of a PEFT adapter to continue from")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of rows: a Hub dataset or a local file."""

    source: Text = key(
        ...,
        "Hub id, or a file, a folder or a pattern: json, jsonl, csv, parquet, arrow, txt, md",
        example="rows.jsonl",
    )
    name: Text | None = key(None, "configuration of a Hub dataset, or of its clone")
    revision: Text | None = key(None, "branch, tag or commit of a Hub dataset")
    split: Text | None = key(None, "such as `train` or `train[:95%]`; null: all rows")
    format: FormatName = key(
        "messages",
        "row format; not given, it is preference with dpo, orpo and simpo, and feedback with kto",
    )
    columns: dict[str, Text] = key({}, "column names: `{format's column: file's column}`")
    max_examples: Count | None = key(None, "take the first N rows of the split")
    weight: Positive = key(1.0, "with several sources: how often this one is seen in an epoch")


@dataclass(frozen=True, kw_only=True)
class Data:
    """The rows, and how they become tokens."""

    train: tuple[Source, ...] = key(
        ...,
        "a source, or a list",
        example="{source: rows.jsonl, format: messages}",
    )
    validation: tuple[Source, ...] = key((), "held-out rows: a source, a list of them, or null")
    hold_out: Share | None = key(
        None,
        "rows of `train` to hold out for validation, chosen by the seed: `5 %` or `50 "
        "examples`; null:"
        " none",
        example="5 %",
    )
    hold_out_seed: Seed | None = key(
        None, "seed that chooses the rows of `hold_out`; null: `train.seed`", free=True
    )
    leave_out: tuple[RowFault, ...] = key(
        (),
        "rows of `train` to leave out, before any are held out; they are counted: near-duplicates"
        " (the first stays), contradictions (all answers to one prompt)",
    )
    template: Text = key(
        "auto",
        "`auto` (the tokenizer's chat template; without one alpaca, and raw where no row has"
        " turns), `chat`, `alpaca`, "
        "`raw` (prompt and completion without a template) or a Jinja file",
    )
    template_args: dict[str, bool | int | float | str] = key(
        {},
        "arguments of the chat template, such as `{enable_thinking: false}`; saved with the"
        " trained model as a part of its template",
    )
    system: str | None = key(None, "system message for rows that have none")
    image_max_pixels: Count | None = key(
        None,
        "pictures of more pixels are scaled down to so many before the model's processor sees them;"
        " null: they go to it as they are",
    )
    seq_len: AtLeastTwo = key(
        2048,
        "maximum length of an example, and length of a packed row, in tokens",
    )
    pack: bool = key(
        True,
        "put several examples in a row, isolated by attention; false: one example a row, padded",
    )
    train_on: Literal["response", "last", "all"] = key(
        "response",
        "all assistant turns, the last one, or all tokens",
    )
    too_long: Literal["auto", "truncate", "drop", "error"] = key(
        "auto",
        "what to do with longer examples; they are counted. auto: split text into several examples,"
        " and truncate others",
    )
    bad_rows: Literal["error", "skip"] = key(
        "error",
        "what to do with rows that cannot be read or rendered: error lists them, skip leaves them"
        " out; they are counted",
    )
    allow_cut_answers: bool = key(
        False,
        "train although more than a tenth of the rows have an answer whose end is cut off by"
        " `seq_len`",
        free=True,
    )
    allow_secrets: bool = key(
        False,
        "train on sessions of agents with secrets: access tokens, private keys, passwords in"
        " addresses",
        free=True,
    )
    shuffle: bool = key(True, "reshuffle each epoch, by the seed; false: file order")


@dataclass(frozen=True, kw_only=True)
class Train:
    """The optimizer and its schedule."""

    duration: Length = key(Length(1, "epochs"), "`1 epochs`, `500 steps` or `2 h`")
    global_batch: Size = key(
        Size(64, "examples"), "batch size of an optimizer step, over all ranks"
    )
    micro_batch: Size | Literal["auto"] = key(
        "auto",
        "batch size of one forward pass, including padding; auto: the largest that fits",
        free=True,
    )
    learning_rate: Positive = key(1e-4, "peak learning rate")
    min_learning_rate: PositiveOrZero = key(0.0, "final learning rate of linear and cosine")
    schedule: Literal["constant", "linear", "cosine"] = key(
        "cosine", "learning-rate schedule after warmup"
    )
    warmup: Length = key(
        Length(3, "%"),
        "linear warmup of the learning rate, as a share of the run or in steps",
    )
    optimizer: Literal["adamw", "adamw-8bit"] = key(
        "adamw", "adamw-8bit keeps both moments in 8 bits (bitsandbytes)"
    )
    optimizer_in_backward: bool = key(
        False,
        "update each parameter during backward and free its gradient: full fine-tuning in less"
        " memory; "
        "needs `clip_norm: null`, and the global batch must fit in one forward pass",
    )
    betas: tuple[Fraction, Fraction] = key(
        (0.9, 0.999),
        "AdamW's betas",
    )
    eps: Positive = key(1e-8, "AdamW's epsilon")
    weight_decay: PositiveOrZero = key(
        0.0, "decoupled weight decay of matrices, not of norms, biases and scalars"
    )
    clip_norm: Positive | None = key(
        1.0,
        "maximum L2 norm of the gradient; null: no clipping",
    )
    master_weights: Literal["fp32", "stochastic"] = key(
        "fp32", "bf16 weights: fp32 copy, or stochastic rounding"
    )
    seed: Seed = key(
        42,
        "seed of data order, new weights and dropout",
    )
    recompute: CountOrZero | Literal["auto", "none", "full"] = key(
        "auto",
        "activation checkpointing: how many layers to recompute in backward; auto: as few as fit"
        " in memory",
        free=True,
    )
    cpu_offload: tuple[Literal["parameters", "activations"], ...] = key(
        (),
        "keep in the host's memory, at the cost of time: parameters (beside an adapter the frozen"
        " layers, without embedding and head, of one process those that do not fit; on several"
        " ranks also a model trained in full, with gradients and moments), activations (the inputs"
        " of recomputed layers)",
        free=True,
    )
    compile: Literal["auto", "on", "off"] = key("auto", "torch.compile", free=True)
    deterministic: bool = key(
        False,
        "bitwise reproducible runs and resumes on a GPU too; slower, and an operator without a"
        " deterministic implementation ends the run",
        free=True,
    )


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How ranks share the work; nothing here changes the result."""

    replicate: Count | Literal["auto"] = key("auto", "data-parallel replicas of the model")
    shard: Count | Literal["auto"] = key(
        "auto",
        "ranks that shard one replica",
    )
    tensor: Count | Literal["auto"] = key(
        1,
        "tensor-parallel ranks, on one node; auto: the fastest",
    )


@dataclass(frozen=True, kw_only=True)
class Validate:
    """Loss on the held-out rows."""

    every: Length | None = key(
        Length(100, "steps"),
        "interval; always also at the end; null: only at the end",
    )
    max_examples: Count | None = key(None, "take the first N held-out examples")
    patience: Count | None = key(None, "stop after N validations without improvement")
    best_by: Literal["loss", "accuracy"] = key(
        "loss",
        "what makes a validation better: a lower loss, or with pairs of answers a higher share of"
        " them in the right order",
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is saved during the run, and how a run resumes."""

    every: Length | None = key(
        Length(200, "steps"),
        "interval; null: only at the end and when stopped",
    )
    keep: Count = key(
        3,
        "how many checkpoints to keep, newest first, beside the best one",
    )
    final: Literal["best", "last"] = key(
        "best",
        "the weights of final/: best: of the best validation whose step has a checkpoint, which"
        " an adapter saves at each new best, and a full model only at `every`; last: of the last"
        " step",
    )
    resume: Literal["auto", "never", "force"] = key(
        "auto",
        "auto: from the newest complete checkpoint; never: start over; force: although the recipe"
        " differs",
    )


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is shown and written during training."""

    every: Length = key(
        Length(1, "steps"),
        "interval of log lines; metrics.jsonl has every step",
    )
    tensorboard: bool | None = key(
        None,
        "write TensorBoard events; null: if tensorboard is installed or tensorboard_dir is set",
    )
    tensorboard_dir: Text | None = key(
        None, "folder of the events; null: `tensorboard/` in output_dir"
    )
    wandb: bool = key(False, "log to Weights & Biases, configured by its own WANDB_ variables")
    trackers: tuple[TrackerName, ...] = key(
        (),
        "others, each configured by its own variables: mlflow, trackio, comet_ml, swanlab, wandb",
    )
    project: Text | None = key(
        None,
        "project of the trackers; null: their own variables (WANDB_PROJECT), else `tunesmith`",
        example="my-project",
    )
    samples: CountOrZero = key(
        2,
        "sample answers to held-out prompts, before the first step (not on shards) and at each"
        " validation; 0: none",
    )
    sample_seconds: Positive = key(
        20.0,
        "seconds for the sample answers before the first step, and again for those of the final"
        " weights, or 1 % of the run's time if that is more; validations take what is left",
    )


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Traces for Perfetto, and a memory snapshot."""

    enabled: bool = key(False, "record a trace and a memory snapshot")
    wait: CountOrZero = key(5, "steps to skip before each cycle")
    warmup: CountOrZero = key(3, "steps to trace and discard")
    active: Count = key(20, "steps to record")
    cycles: Count = key(1, "how many cycles")
    stacks: bool = key(False, "record Python call stacks: larger traces, slower steps")
    ranks: tuple[CountOrZero, ...] | Literal["all"] = key(
        "all", "the ranks that record, such as [0]"
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One resolved recipe: everything that defines a run."""

    # Read by pydantic, also for the sections below: nothing coerced, nothing unknown, `from_`
    # written `from`.
    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "strict": True,
        "extra": "forbid",
        "allow_inf_nan": False,
        "alias_generator": yaml_name,
    }

    method: MethodConfig = key(
        MethodConfig(),
        "the training method: a name, or a mapping with its parameters",
        example="{name: dpo}",
    )
    model: Model = key(..., "the base model", example="{name: meta-llama/Llama-3.1-8B-Instruct}")
    adapter: Adapter = key(Adapter(), "what is trained")
    data: Data = key(
        ...,
        "the rows and their tokenization",
        example="{train: {source: rows.jsonl, format: messages}}",
    )
    train: Train = key(Train(), "the optimizer and its schedule")
    parallel: Parallel = key(Parallel(), "how ranks share the work", free=True)
    validate: Validate = key(Validate(), "loss on the held-out rows", free=True)
    checkpoint: Checkpoint = key(Checkpoint(), "checkpoints, and how a run resumes", free=True)
    log: Log = key(Log(), "logging and trackers", free=True)
    profile: Profile = key(Profile(), "traces and a memory snapshot", free=True)
    output_dir: Text = key(
        ...,
        "the run directory; not the working or the home directory",
        example="runs/mine",
        free=True,
    )

    @property
    def extra_forwards(self) -> int:
        """Passes of a step's tokens beside the one that is trained on.

        A reference that is not known before training takes one. KTO's reference point takes two
        more, on answers of other rows: the model, and its reference where unknown.
        """
        if self.adapter.kind == "none":
            return 1 if self.method.name == "kto" else 0
        passes = {"dpo": 1, "kto": 3}
        return passes.get(self.method.name, 0)

    @property
    def row_tokens(self) -> int:
        """Length of a packed row: the largest example fits, of which a pair has two sequences."""
        return self.data.seq_len * (2 if self.method.name in PAIR_METHODS else 1)
