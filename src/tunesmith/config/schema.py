"""Schema of a recipe as frozen, typed dataclasses: every key with its type, bounds, default and
documentation.

`typed.py` builds the dataclasses from YAML and the command line with pydantic. `check.py` has the
rules that involve several keys. `describe.py` writes the reference page. This module does not
import torch.

A field accepts only values of its type. A `Literal` field accepts the listed words. A `Length`,
`Size` or `Share` field accepts text in the grammar of `tunesmith.units`. `X | None` also accepts
`null`. Values are not converted to another type: `pack: "true"` is refused.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Interval, MinLen

from tunesmith.config.methods import METHOD_FACTS, MethodFacts, MethodName
from tunesmith.config.row_formats import FormatName
from tunesmith.units import Length, Share, Size

if TYPE_CHECKING:
    from pydantic import TypeAdapter

# Text that must not be empty: a name, a path or a branch.
Text = Annotated[str, MinLen(1)]
Count = Annotated[int, Interval(ge=1, lt=2**63)]
# The upper bound prevents an overflow of torch's 64-bit tensor sizes by rank * width of a layer.
Rank = Annotated[int, Interval(ge=1, lt=2**31)]
AtLeastTwo = Annotated[int, Interval(ge=2, lt=2**63)]
CountOrZero = Annotated[int, Interval(ge=0, lt=2**63)]
Positive = Annotated[float, Gt(0)]
PositiveOrZero = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, lt=1)]
Seed = Annotated[int, Interval(ge=0, lt=2**32)]
# accelerate's trackers that can continue an existing run; see metrics/trackers.py.
TrackerName = Literal["mlflow", "trackio", "comet_ml", "swanlab", "wandb"]

Dtype = Literal["bf16", "fp16", "fp32"]
StatedDtype = Literal["auto", "bf16", "fp16", "fp32"]
Quantize = Literal["auto", "none", "fp8", "nf4", "as-shipped"]
# Names of the problems of rows, which are the values of `data.leave_out`.
# rows/compare/row_checks.py finds rows with these problems.
RowFault = Literal["near-duplicates", "contradictions"]


def key(
    default: Any,
    doc: str,
    *,
    example: str = "",
    free: bool = False,
) -> Any:
    """Declare a recipe key. This function is a wrapper of `dataclasses.field`.

    Args:
        default: the default value. `...` means that the key is required. A required key must have
            an example.
        doc: the documentation for the reference page and for error messages.
        example: an example value in YAML.
        free: whether a run can resume with other values of this key and its nested keys. This is
            possible if no training step depends on them.
    """
    # pydantic reads `description` and `json_schema_extra` for the JSON Schema.
    metadata: dict[str, Any] = {"description": doc, "example": example, "free": free}
    if default is ...:
        return field(metadata=metadata)
    if default == {}:
        metadata["json_schema_extra"] = {"default": {}}
        return field(default_factory=dict, metadata=metadata)
    if isinstance(default, Length | Size):
        metadata["json_schema_extra"] = {"default": str(default)}
    return field(default=default, metadata=metadata)


def yaml_name(name: str) -> str:
    """Convert the name of a dataclass field to a recipe key, for example `from_` to `from`."""
    return name.removesuffix("_")


def is_section(hint: Any) -> bool:
    """Return whether a type is a section of the recipe, which is a dataclass of this module."""
    return isinstance(hint, type) and hint.__module__ == __name__


# Minimum number of optimizer steps without a warning. In a shorter run most steps are warmup of the
# learning rate, so the model changes little.
FEW_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The training method and the parameters of its loss. Names and defaults are those of TRL."""

    name: MethodName = key(
        "sft",
        "sft: supervised fine-tuning; dpo, orpo, simpo: training on pairs of a good and a bad"
        " answer; kto: training on answers labeled good or bad; grpo: reinforcement learning on"
        " answers of the model, which a scorer rewards",
    )
    beta: PositiveOrZero = key(
        0.1,
        "dpo, kto: strength of the KL penalty to the reference; orpo: weight of the odds ratio;"
        " simpo: scale of the margin; grpo: weight of the KL divergence to the base model (default"
        " with grpo: 0)",
    )
    loss_type: Literal["sigmoid", "ipo", "hinge", "robust"] = key(
        "sigmoid",
        "dpo: loss function of a pair's margin; robust: for labels that are partly wrong",
    )
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = key(
        0.0, "dpo with loss_type robust: assumed fraction of pairs whose answers are swapped"
    )
    sft_weight: PositiveOrZero = key(
        0.0, "dpo: weight of the cross-entropy of the chosen answer, added to the loss"
    )
    desirable_weight: PositiveOrZero = key(1.0, "kto: weight of good answers")
    undesirable_weight: PositiveOrZero = key(1.0, "kto: weight of bad answers")
    simpo_gamma: PositiveOrZero = key(
        0.5, "simpo: target margin between the chosen and the rejected answer"
    )
    reward: Text | tuple[Text, ...] = key(
        "exact",
        "grpo: scorer of the answers, as in `eval --score`: exact, contains, regex, json, f1,"
        " rouge-l, or `file.py:function`; or a list of scorers, whose scores are added",
    )
    reward_weights: tuple[float, ...] = key(
        (), "grpo: weight of each scorer in `reward`; empty: 1 for each"
    )
    reward_seconds: Positive = key(
        10.0, "grpo: time limit in seconds for your own scorer of one answer"
    )
    group: AtLeastTwo = key(8, "grpo: number of answers that are sampled for each prompt")
    answer_tokens: Count = key(512, "grpo: maximum number of tokens of a sampled answer")
    temperature: Positive = key(1.0, "grpo: temperature of the sampling")
    variant: Literal["dapo", "grpo", "dr_grpo", "rloo"] = key(
        "dapo",
        "grpo: how answers are weighted; dapo: all tokens of the batch alike; grpo: all answers"
        " alike; dr_grpo: all tokens alike, divided by `answer_tokens`; rloo: baseline without the"
        " answer itself",
    )
    scale_rewards: bool | None = key(
        None,
        "grpo: divide advantages by the standard deviation of the rewards to the same prompt; null:"
        " only with variant `grpo`",
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """The base model."""

    name: Text = key(
        ...,
        "Hub id or local folder of the model, or `demo`",
        example="meta-llama/Llama-3.1-8B-Instruct",
    )
    revision: Text | None = key(None, "branch, tag or commit on the Hub; null: `main`")
    tokenizer: Text | None = key(
        None, "Hub id or folder of the tokenizer; null: the tokenizer of the model"
    )
    dtype: StatedDtype = key(
        "auto",
        "dtype of weights and matmuls; fp16 uses loss scaling; auto: bf16 if the processor supports"
        " it in hardware, else fp32 if the weights fit into memory",
    )
    quantize: Quantize = key(
        "auto",
        "quantization of the frozen base model; none: no quantization; fp8: faster (needs bf16 "
        "and a Hopper, Ada or"
        " Blackwell GPU); nf4: less memory (the format of bitsandbytes); as-shipped: keep the"
        " quantized weights of a checkpoint in FP8, NVFP4 or MXFP4; auto: as-shipped for such a"
        " checkpoint, else none",
    )
    attention: Literal["auto", "eager"] = key(
        "auto",
        "attention implementation; auto: the fastest one for packed rows; eager: Transformers'"
        " eager attention",
        free=True,
    )
    vision: bool = key(
        False,
        "load the vision encoder of a vision-language model too, frozen, so that rows can have"
        " images; false: only the text model",
    )
    train_projector: bool = key(
        False,
        "with `vision`: also train all weights of the projector, which converts image features to"
        " token embeddings",
    )
    trust_remote_code: bool = key(
        False,
        "run Python code from the model's repository; accepted in your own recipe and on the"
        " command line; in the config.yaml of another person's run and in an extended recipe of a"
        " subfolder only with --trust-remote-code",
    )
    added_tokens: tuple[Text, ...] = key(
        (), "special tokens to add; with LoRA, `modules_to_save` must name `embed_tokens`"
    )
    pad_token: Text | None = key(
        None, "padding token; null: the tokenizer's pad token, else unk, else eos"
    )


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The trained weights: a LoRA adapter, or all weights of the model with `kind: none`."""

    kind: Literal["lora", "none"] = key(
        "lora",
        "lora: train a LoRA adapter; none: full fine-tuning",
    )
    rank: Rank = key(
        8,
        "LoRA rank (r)",
    )
    alpha: Positive = key(16.0, "LoRA alpha; the update is scaled by alpha / rank")
    dropout: Fraction = key(0.0, "dropout on the input of lora_A, at least 0 and below 1")
    target: Text | tuple[Text, ...] = key(
        "all-linear",
        "`all-linear` (all linear layers except the output layer, and all experts) or a list of"
        " module names",
    )
    rslora: bool = key(
        False,
        "scale by alpha / sqrt(rank), as rsLoRA does",
    )
    modules_to_save: tuple[Text, ...] = key(
        (), "modules whose weights are all trained, such as `embed_tokens`, `lm_head`"
    )
    # A recipe calls this key `from`, which is a keyword of Python.
    from_: Text | None = key(
        None, "PEFT adapter to continue from: a run directory, a folder or a Hub id"
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of rows: a Hub dataset or a local file."""

    source: Text = key(
        ...,
        "Hub id, or a file, a folder or a glob pattern: json, jsonl, csv, parquet, arrow, txt, md",
        example="rows.jsonl",
    )
    name: Text | None = key(None, "configuration of a dataset on the Hub, or of a clone of one")
    revision: Text | None = key(None, "branch, tag or commit of a dataset on the Hub")
    split: Text | None = key(
        None, "split of the data set, such as `train` or `train[:95%]`; null: all rows"
    )
    format: FormatName = key(
        "messages",
        "row format; the default is preference with dpo, orpo and simpo, feedback with kto",
    )
    columns: dict[str, Text] = key(
        {}, "names of the columns in the file: `{format's column: file's column}`"
    )
    max_examples: Count | None = key(None, "use only the first N rows of the split")
    weight: Positive = key(
        1.0, "with several sources: how often the rows of this source are seen in an epoch"
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """The rows of the data set and their conversion to tokens."""

    train: tuple[Source, ...] = key(
        ...,
        "training rows: a source, or a list of sources",
        example="{source: rows.jsonl, format: messages}",
    )
    validation: tuple[Source, ...] = key((), "held-out rows: a source, a list of sources, or null")
    hold_out: Share | None = key(
        None,
        "rows of `train` to hold out for validation, chosen by the seed: `5 %` or `50 "
        "examples`; null: none",
        example="5 %",
    )
    hold_out_seed: Seed | None = key(
        None, "seed that chooses the rows of `hold_out`; null: `train.seed`", free=True
    )
    leave_out: tuple[RowFault, ...] = key(
        (),
        "rows of `train` to leave out before rows are held out; near-duplicates: all but the first"
        " of similar rows; contradictions: all rows of a prompt with contradictory answers; the"
        " number of these rows is reported",
    )
    template: Text = key(
        "auto",
        "`auto` (the tokenizer's chat template; if it has none: alpaca, or raw if no row has"
        " turns), `chat`, `alpaca`, "
        "`raw` (prompt and completion without a template) or a Jinja file",
    )
    template_args: dict[str, bool | int | float | str] = key(
        {},
        "arguments of the chat template, such as `{enable_thinking: false}`; they are saved in the"
        " template of the trained model",
    )
    system: str | None = key(None, "system message for rows that have none")
    image_max_pixels: Count | None = key(
        None,
        "maximum number of pixels of an image; larger images are scaled down before the model's"
        " processor; null: no limit",
    )
    seq_len: AtLeastTwo = key(
        2048,
        "maximum length of an example, and length of a packed row, in tokens",
    )
    pack: bool = key(
        True,
        "put several examples into one row, whose tokens attend only to their own example; false:"
        " one example per row, padded",
    )
    train_on: Literal["response", "last", "all"] = key(
        "response",
        "tokens that enter the loss; response: all assistant turns; last: the last assistant turn;"
        " all: all tokens",
    )
    too_long: Literal["auto", "truncate", "drop", "error"] = key(
        "auto",
        "what to do with examples longer than `seq_len`, whose number is reported; auto: split text"
        " into several examples, and truncate other examples",
    )
    bad_rows: Literal["error", "skip"] = key(
        "error",
        "what to do with rows that cannot be read or rendered; error: list them and stop; skip:"
        " leave them out and report their number",
    )
    allow_cut_answers: bool = key(
        False,
        "train even if `seq_len` cuts off the end of the answer in more than a tenth of the rows",
        free=True,
    )
    allow_secrets: bool = key(
        False,
        "train even if agent sessions contain secrets: access tokens, private keys, passwords in"
        " URLs",
        free=True,
    )
    shuffle: bool = key(True, "shuffle the rows in each epoch, by the seed; false: file order")


@dataclass(frozen=True, kw_only=True)
class Train:
    """The optimizer and its schedule."""

    duration: Length = key(
        Length(1, "epochs"), "length of the run, such as `1 epochs`, `500 steps` or `2 h`"
    )
    global_batch: Size = key(
        Size(64, "examples"), "batch size of an optimizer step, over all ranks"
    )
    micro_batch: Size | Literal["auto"] = key(
        "auto",
        "batch size of one forward pass, including padding; auto: the largest that fits",
        free=True,
    )
    learning_rate: Positive = key(1e-4, "peak learning rate")
    min_learning_rate: PositiveOrZero = key(
        0.0, "final learning rate of the schedules linear and cosine"
    )
    schedule: Literal["constant", "linear", "cosine"] = key(
        "cosine", "learning-rate schedule after warmup"
    )
    warmup: Length = key(
        Length(3, "%"),
        "linear warmup of the learning rate, in % of the run, in steps or in epochs",
    )
    optimizer: Literal["adamw", "adamw-8bit"] = key(
        "adamw", "optimizer; adamw-8bit stores both moments in 8 bits (bitsandbytes)"
    )
    optimizer_in_backward: bool = key(
        False,
        "update each parameter during backward and free its gradient, which saves memory in full"
        " fine-tuning; "
        "needs `clip_norm: null`, and the global batch must fit in one forward pass",
    )
    betas: tuple[Fraction, Fraction] = key(
        (0.9, 0.999),
        "AdamW's betas",
    )
    eps: Positive = key(1e-8, "AdamW's epsilon")
    weight_decay: PositiveOrZero = key(
        0.0, "decoupled weight decay of matrices; norms, biases and scalars have none"
    )
    clip_norm: Positive | None = key(
        1.0,
        "maximum L2 norm of the gradient; null: no clipping",
    )
    master_weights: Literal["fp32", "stochastic"] = key(
        "fp32", "how to train bf16 weights: with an fp32 copy, or with stochastic rounding"
    )
    seed: Seed = key(
        42,
        "seed of the data order, of new weights and of dropout",
    )
    recompute: CountOrZero | Literal["auto", "none", "full"] = key(
        "auto",
        "activation checkpointing: number of layers to recompute in backward; auto: the smallest"
        " number that fits into memory",
        free=True,
    )
    cpu_offload: tuple[Literal["parameters", "activations"], ...] = key(
        (),
        "tensors to store in host memory, which is slower; parameters: with an adapter, the frozen"
        " layers without embeddings and output layer (in one process only the layers that do not"
        " fit); on several ranks also a fully trained model with its gradients and moments;"
        " activations: the inputs of recomputed layers",
        free=True,
    )
    compile: Literal["auto", "on", "off"] = key(
        "auto", "use torch.compile; auto: on a GPU where the compiler works", free=True
    )
    deterministic: bool = key(
        False,
        "make runs and resumes on a GPU bit for bit reproducible; this is slower, and an operator"
        " without a deterministic implementation stops the run",
        free=True,
    )


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """The distribution of the work over the ranks. These keys do not change the result."""

    replicate: Count | Literal["auto"] = key("auto", "number of data-parallel replicas")
    shard: Count | Literal["auto"] = key(
        "auto",
        "number of ranks that shard one replica",
    )
    tensor: Count | Literal["auto"] = key(
        1,
        "number of tensor-parallel ranks, on one node; auto: the fastest number",
    )


@dataclass(frozen=True, kw_only=True)
class Validate:
    """Validation: the loss on the held-out rows."""

    every: Length | None = key(
        Length(100, "steps"),
        "interval of the validations; null: only at the end; a validation at the end always runs",
    )
    max_examples: Count | None = key(None, "use only the first N held-out examples")
    patience: Count | None = key(None, "stop after N validations without improvement")
    best_by: Literal["loss", "accuracy", "reward"] = key(
        "loss",
        "score that selects the best validation; loss: the lowest loss; accuracy: with pairs of "
        "answers,"
        " the largest fraction of pairs in the right order; reward: with grpo, the largest reward"
        " (the loss is 1 minus the reward)",
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Checkpoints that are saved during the run, and how a run resumes."""

    every: Length | None = key(
        Length(200, "steps"),
        "interval of the checkpoints; null: only at the end and when the run is stopped",
    )
    keep: Count = key(
        3,
        "number of newest checkpoints to keep, in addition to the best one",
    )
    final: Literal["best", "last"] = key(
        "best",
        "weights to write to final/; best: those of the best validation whose step has a checkpoint"
        " (an adapter is saved at each new best, a full model only at `every`); last: those of the"
        " last step",
    )
    resume: Literal["auto", "never", "force"] = key(
        "auto",
        "how to start if output_dir has checkpoints; auto: resume from the newest complete"
        " checkpoint; never: start over; force: resume even if the recipe differs",
    )


@dataclass(frozen=True, kw_only=True)
class Log:
    """Log lines, trackers and sample answers during training."""

    every: Length = key(
        Length(1, "steps"),
        "interval of log lines; metrics.jsonl has every step",
    )
    tensorboard: bool | None = key(
        None,
        "write TensorBoard events; null: only if tensorboard is installed or tensorboard_dir is "
        "set",
    )
    tensorboard_dir: Text | None = key(
        None, "folder of the TensorBoard events; null: `tensorboard/` in output_dir"
    )
    wandb: bool = key(False, "log to Weights & Biases, configured by the variables WANDB_*")
    trackers: tuple[TrackerName, ...] = key(
        (),
        "trackers to log to, each configured by its environment variables: mlflow, trackio,"
        " comet_ml, swanlab, wandb",
    )
    project: Text | None = key(
        None,
        "project name for the trackers; null: from their environment variables, such as"
        " WANDB_PROJECT, else `tunesmith`",
        example="my-project",
    )
    samples: CountOrZero = key(
        2,
        "number of sample answers to held-out prompts, before the first step (not with sharded"
        " weights) and at each validation; 0: none",
    )
    sample_seconds: Positive = key(
        20.0,
        "maximum seconds for all sample answers so far, or 5 % of the training time if more;"
        " one prompt is answered before the first step and by the final weights in any case",
    )


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Profiling: traces for Perfetto, and a memory snapshot."""

    enabled: bool = key(False, "record a trace and a memory snapshot")
    wait: CountOrZero = key(5, "steps to skip before each cycle")
    warmup: CountOrZero = key(3, "steps to trace and discard in each cycle")
    active: Count = key(20, "steps to record in each cycle")
    cycles: Count = key(1, "number of cycles")
    stacks: bool = key(
        False, "record Python call stacks, which makes traces larger and steps slower"
    )
    ranks: tuple[CountOrZero, ...] | Literal["all"] = key(
        "all", "ranks that record a trace, such as [0]"
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """A resolved recipe, which defines a run completely."""

    # Settings of pydantic for this class and its sections. Values are not converted to another
    # type, unknown keys are refused, and the field `from_` is read from the key `from`.
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
    adapter: Adapter = key(Adapter(), "the trained weights: a LoRA adapter, or all weights")
    data: Data = key(
        ...,
        "the rows and their tokenization",
        example="{train: {source: rows.jsonl, format: messages}}",
    )
    train: Train = key(Train(), "the optimizer and its schedule")
    parallel: Parallel = key(Parallel(), "how the ranks share the work", free=True)
    validate: Validate = key(Validate(), "the loss on the held-out rows", free=True)
    checkpoint: Checkpoint = key(Checkpoint(), "checkpoints, and how a run resumes", free=True)
    log: Log = key(Log(), "logging and trackers", free=True)
    profile: Profile = key(Profile(), "traces and a memory snapshot", free=True)
    output_dir: Text = key(
        ...,
        "the run directory, which must not be the working or the home directory",
        example="runs/mine",
        free=True,
    )

    @property
    def samples_answers(self) -> bool:
        """Return whether the run trains on answers that the model samples."""
        return self.method_facts.samples

    @property
    def method_facts(self) -> MethodFacts:
        return METHOD_FACTS[self.method.name]

    @property
    def uses_reference(self) -> bool:
        """Return whether the method compares the trained model with the model before training."""
        reference = self.method_facts.reference
        return reference == "always" or (reference == "with beta" and self.method.beta > 0)

    @property
    def extra_forwards(self) -> int:
        """Number of forward passes per step in addition to the pass of the training loss.

        In full fine-tuning, the log-probabilities of the reference are computed before training.
        """
        if not self.uses_reference:
            return 0
        return self.method_facts.passes[self.adapter.kind == "none"]

    @property
    def row_tokens(self) -> int:
        """Length of a packed row in tokens.

        For preference pairs it is 2 * `data.seq_len`, because a pair has two sequences.
        """
        return self.data.seq_len * self.method_facts.sequences


@cache
def run_type() -> "TypeAdapter[Run]":
    """Return the pydantic adapter of `Run`, which reads and writes values and creates the JSON
    Schema.
    """
    from pydantic import TypeAdapter

    return TypeAdapter(Run)
