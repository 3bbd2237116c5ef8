"""`tunesmith selfcheck`: the engine's own steps on one process, and on meshes of the ranks.

There is a mesh of each kind that the ranks can form. The model is built here, the same on every
node: a random Llama, an adapter with a random B, and rows.
"""

import hashlib
import json
import math
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tunesmith.adapter.peft_files import PLAIN_LORA_CONFIG, PREFIX, write_adapter
from tunesmith.checkpoint.replicate import find_run_dir_writers
from tunesmith.checkpoint.resume import decide_start
from tunesmith.checkpoint.sharded import RanksWriter
from tunesmith.config.load import from_mapping
from tunesmith.config.schema import Run
from tunesmith.distributed.heartbeat import AGREED
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks, choose_gpu, join_ranks, started_as
from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import (
    EXIT_FAILED,
    MachineError,
    OtherRankError,
    RunError,
    TunesmithError,
    first_line,
)
from tunesmith.formats.nf4 import check_nf4
from tunesmith.host.logger import stderr_only_from
from tunesmith.host.signals import StopRequest
from tunesmith.metrics.record import StepRecord
from tunesmith.metrics.sink import Sinks
from tunesmith.model.safetensors_files import ADAPTER_WEIGHTS
from tunesmith.parallel.mesh import ONE, Mesh, MeshShape
from tunesmith.quant.schemes import NF4, scheme_of
from tunesmith.run_dir import Phase
from tunesmith.training.agree import check_same_recipe
from tunesmith.training.build import build, write_identity
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer

# name -> adapter.kind, model.quantize
TRAINING_KINDS = {
    "lora": ("lora", "none"),
    "full": ("none", "none"),
    "nf4 lora": ("lora", "nf4"),
}
STEPS = 4
# The steps after this one run again from its checkpoint; the last shows the moments.
RESUMED = 2


# Largest relative differences, of the first step and of resumed ones, and of the others. In fp32
# meshes differ in the order of their sums, and AdamW's first updates, as large for a small gradient
# as for a large one, may widen that: up to 3e-7 was seen. A GPU's kernels choose their order by
# shape, and attention's varies: its limits are estimates. bf16 rounds to 8 bits, in other places
# for another micro batch: up to 4e-4 was seen, on CPUs alone. Resumed steps were equal.
TOLERANCES = {
    ("fp32", "cpu"): (1e-6, 1e-4),
    ("fp32", "cuda"): (1e-5, 1e-3),
    ("bf16", "cuda"): (5e-3, 1e-2),
}
# Of the adapter.
LORA_RANK = 4
LORA_ALPHA = 8.0
# In place of a limit of 0.
TINY = 1e-30
# That a rank may take without progress: a whole mesh takes seconds.
STUCK_SECONDS = 180.0
# Heads, KV heads, widths, and the blocks of nf4 in a row are divisible by 8. One token of the 272
# is no byte and ends a text.
SHAPE: dict[str, int | bool | None] = {
    "vocab_size": 272,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": None,
}
LOSS_CHECK = "loss"
NORM_CHECK = "gradient norm"
RESUME_CHECK = "resumed loss and norm"
CHANGED_CHECK = "changed parameters"
COPIES_CHECK = "equal copies on ranks"
# Of a check that failed.
MEANING = {
    LOSS_CHECK: "these ranks use a different model or different rows than one process: "
    "wrongly sharded layers, or other weights",
    NORM_CHECK: "gradients are reduced incorrectly over these ranks, "
    "or the norm counts some twice or not at all",
    RESUME_CHECK: "a checkpoint of these ranks misses a part of their state, "
    "or is loaded into the wrong places",
    CHANGED_CHECK: "the backward does not reach a trained parameter, "
    "or the optimizer or final/ omits it",
    COPIES_CHECK: "ranks have different values of the same weight or moment: replicas diverge",
}
MakeMesh = Callable[[MeshShape, str], Mesh]


class Kind(NamedTuple):
    """A kind of training: a name of TRAINING_KINDS, in a dtype."""

    name: str
    dtype: str


class CheckRow(TypedDict):
    """One line of the table, as `selfcheck --json` prints it.

    `step` is that of the figures.
    """

    check: str
    mesh: MeshShape | None
    step: int | None
    expected: str
    found: str
    tolerance: str
    passed: bool
    meaning: str


class Report(TypedDict):
    """The result of a check, as `selfcheck --json` prints it."""

    passed: bool
    ranks: int
    device: str
    hosts: list[str]
    seconds: float
    checks: list[CheckRow]


# The name of a tensor, and where the rank's part of it begins and ends.
PartOfTensor = tuple[str, tuple[tuple[int, int], ...]]


def meshes_of(world: int, node: int) -> list[MeshShape]:
    """One mesh of several ranks for each choice of dimensions that are larger than 1.

    It has the largest tensor group on a `node` of so many ranks, then the most shards, so that on
    nodes of 8 ranks either is a node.
    """
    meshes = {}
    for tensor in (1, 2, 4, 8):
        for shard in range(1, world + 1):
            if node % tensor == 0 and world % (shard * tensor) == 0:
                shape = MeshShape(world // (shard * tensor), shard, tensor)
                # A later one has a larger group, and replaces the one of its kind.
                meshes[tuple(size > 1 for size in shape)] = shape
    return list(meshes.values())


def write_inputs(folder: Path, count: int) -> None:
    """Write model/, adapter/ and rows.jsonl, with `count` rows, into an existing folder."""
    weights = write_model(folder / "model")
    (folder / "adapter").mkdir()
    write_random_adapter(folder / "adapter", weights)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for i in range(count):
            # Lengths and steps differ from row to row, so that rows of a batch differ in tokens.
            step = i % 7 + 1
            numbers = " ".join(str(i + k * step) for k in range(4 + i % 9))
            row = {"prompt": f"Count from {i} by {step}: ", "completion": numbers}
            file.write(json.dumps(row) + "\n")


def write_model(folder: Path) -> dict[str, torch.Tensor]:
    """Write a Llama of SHAPE whose tokens are bytes; its random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # Each byte is a token, and nothing is merged: no file of a vocabulary is needed.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.save_pretrained(folder)
    # The same weights on each machine and at each call.
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=256, pad_token_id=256))
    model.config.save_pretrained(folder)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file(weights, folder / "model.safetensors")
    return weights


def write_random_adapter(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """An adapter of all linear layers among the weights, in PEFT's files."""
    tensors: dict[str, torch.Tensor] = {}
    targets = set()
    for key, weight in weights.items():
        name = key.removesuffix(".weight")
        if "layers" not in name or weight.dim() != 2:
            continue
        outputs, inputs = weight.shape
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(LORA_RANK, inputs) / inputs**0.5
        # With B = 0 the gradient of A would be zero, and a layer that gets none would look like the
        # others.
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(outputs, LORA_RANK) / outputs**0.5
        targets.add(name.rpartition(".")[2])
    settings = {"r": LORA_RANK, "lora_alpha": LORA_ALPHA, "target_modules": sorted(targets)}
    write_adapter(folder, tensors, PLAIN_LORA_CONFIG | settings)


class SelfCheck:
    """The checks of one rank.

    Args:
        folder: the same path on all nodes.
        on_row: takes each row of the table, which rank 0 alone has.
    """

    def __init__(self, folder: Path, world: int, on_row: Callable[[CheckRow], None]) -> None:
        self.folder = folder
        self.on_row = on_row
        # Examples of a step.
        self.batch = max(8, 2 * world)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # fp32 has the tighter tolerance; on GPUs bf16 takes the kernels of a real run.
        dtypes = [dtype for dtype in ("fp32", "bf16") if (dtype, self.device.type) in TOLERANCES]
        names = [*TRAINING_KINDS]
        try:
            check_nf4(self.device)
        except MachineError:
            # nf4 needs a package.
            names.remove("nf4 lora")
        self.kinds = [Kind(name, dtype) for dtype in dtypes for name in names]
        # Once for all runs on it: its process groups take sockets and NCCL's memory.
        self.make_mesh = cache(Mesh.of)
        self.rows: list[CheckRow] = []
        # The records of one process that has one micro batch a step.
        self.reference_records: dict[Kind, list[StepRecord]] = {}
        # What the next rows are of.
        self.part = ""
        self.mesh: MeshShape | None = None

    def add(
        self,
        check: str,
        expected: object,
        actual: object,
        passed: bool,
        step: int | None = None,
        limit: str = "",
    ) -> None:
        """A row of the table."""
        row = CheckRow(
            check=f"{self.part}{check}",
            mesh=self.mesh,
            step=step,
            expected=str(expected),
            found=str(actual),
            tolerance=limit,
            passed=passed,
            meaning="" if passed else MEANING[check],
        )
        self.rows.append(row)
        self.on_row(row)

    def equal(self, check: str, expected: object, actual: object) -> None:
        """A row whose sides must be equal."""
        self.add(check, expected, actual, expected == actual)

    def compare(
        self,
        check: str,
        names: Sequence[str],
        expected: list[StepRecord],
        actual: list[StepRecord],
        limits: Sequence[float],
    ) -> None:
        """A row with the step and figure that differ most, as a share of their step's limit."""
        figures = []
        for reference, record, allowed in zip(expected, actual, limits, strict=True):
            for name in names:
                value, found = vars(reference)[name], vars(record)[name]
                # A figure of 0 allows nothing: TINY stands in for the division.
                share = abs(found - value) / max(abs(allowed * value), TINY)
                figures.append((share, reference.step, allowed, value, found))
        share, step, allowed, value, found = max(figures)
        limit_text = f"{allowed:.0e}"
        self.add(check, f"{value:.8g}", f"{found:.8g}", share <= 1, step, limit_text)

    @contextmanager
    def on(self, kind: Kind, shape: MeshShape, ranks: Ranks) -> Iterator[None]:
        """Rows, errors and hangs of the block name what is trained, and on which mesh."""
        what = kind.name if kind.dtype == "fp32" else f"{kind.name} {kind.dtype}"
        self.part = f"{what}, {shape.describe()}: "
        self.mesh = shape
        ranks.heartbeat.activity.phase_prefix = self.part
        ranks.heartbeat.activity.longest_limit = STUCK_SECONDS
        ranks.heartbeat.phase(Phase.LOADING)
        try:
            yield
        except OtherRankError:
            raise
        except Exception as error:
            # All ranks raise it, and rank 0 reports it.
            if isinstance(error, AGREED) and not ranks.is_main_process:
                raise OtherRankError(str(error), exit_code=EXIT_FAILED) from error
            text = f"{type(error).__name__}: {first_line(error)}"
            cause = error if isinstance(error, TunesmithError) else RunError(text)
            fix = cause.fix or "TUNESMITH_DEBUG=1 shows the traceback"
            what = f"{self.part}{cause.what}"
            raise RunError(what, where=cause.where, why=cause.why, fix=fix) from error
        self.part = ""
        self.mesh = None

    def recipe(self, kind: Kind, shape: MeshShape, *, count: int) -> Run:
        """LoRA or full fine-tuning on a mesh.

        Each rank takes `count` micro batches a step, or more.
        """
        adapter, quantize = TRAINING_KINDS[kind.name]
        # The global batch is the same on every mesh; only how it is cut differs.
        micro_batch = self.batch // (count * shape.data)
        adapter_values: dict[str, str | float] = {"kind": adapter}
        if adapter == "lora":
            start = str(self.folder / "adapter")
            adapter_values |= {"rank": LORA_RANK, "alpha": LORA_ALPHA, "from": start}
        # Each kind and mesh has a run directory of its own.
        out = "-".join(map(str, (*kind, micro_batch, *shape))).replace(" ", "-")
        model = {"name": str(self.folder / "model"), "dtype": kind.dtype, "quantize": quantize}
        rows = {"source": str(self.folder / "rows.jsonl"), "format": "prompt-completion"}
        values = {
            "model": model,
            "adapter": adapter_values,
            "data": {"train": rows, "seq_len": 256},
            "train": {
                "duration": f"{STEPS} steps",
                "global_batch": f"{self.batch} examples",
                "compile": "off",
                "micro_batch": f"{micro_batch} examples",
                "schedule": "constant",
                "warmup": "0 steps",
                # In bf16 less would not show on a norm's weight, which is near 1.
                "learning_rate": 4e-3,
            },
            "parallel": shape._asdict(),
            "checkpoint": {"every": f"{RESUMED} steps"},
            "log": {"tensorboard": False, "samples": 0},
            "output_dir": str(self.folder / out),
        }
        return from_mapping(values, where="selfcheck", base=self.folder)

    def reference(self, kind: Kind) -> None:
        """Train on one process with one micro batch a step."""
        trainer = take_steps(self.recipe(kind, ONE, count=1), ONE_PROCESS)
        self.reference_records[kind] = trainer.metrics.records

    def check_mesh(self, kind: Kind, shape: MeshShape, ranks: Ranks) -> None:
        """Train on a mesh with two micro batches a step, and compare with `reference`.

        A collective call.
        """
        run = self.recipe(kind, shape, count=2)
        first, others = TOLERANCES[kind.dtype, self.device.type]
        trainer = take_steps(run, ranks, self.make_mesh)
        digests = ranks.all_gather_object(digests_of(trainer))
        records = trainer.metrics.records
        if ranks.is_main_process:
            reference = self.reference_records[kind]
            # The first step begins from equal weights; later ones inherit its differences.
            limits = [first] + [others] * (STEPS - 1)
            self.compare(LOSS_CHECK, ["loss"], reference, records, limits)
            self.compare(NORM_CHECK, ["grad_norm"], reference, records, limits)
            self.equal(CHANGED_CHECK, *self.count_changed(run))
            self.compare_copies(digests)
        # At a resume its base is built as at the start, and its adapter as LoRA's.
        if scheme_of(run.model) is not NF4:
            self.check_resume(run, ranks, records, first)

    def check_resume(self, run: Run, ranks: Ranks, records: list[StepRecord], limit: float) -> None:
        """Take the steps after RESUMED again from its checkpoint, and compare with `records`.

        A collective call.
        """
        if ranks.local_rank == 0:
            # As if the last steps had never been.
            out = Path(run.output_dir)
            shutil.rmtree(out / f"checkpoint-{STEPS}", ignore_errors=True)
            shutil.rmtree(out / "final", ignore_errors=True)
        ranks.all_gather_object(None)
        resumed = take_steps(run, ranks, self.make_mesh)
        if ranks.is_main_process:
            names = ["loss", "grad_norm"]
            again = resumed.metrics.records
            self.compare(RESUME_CHECK, names, records[RESUMED:], again, [limit] * len(again))

    def compare_copies(self, digests: list[dict[PartOfTensor, str]]) -> None:
        """Check that ranks that hold the same part of a tensor hold equal values."""
        copies = defaultdict(list)
        for rank_digests in digests:
            for part, digest in rank_digests.items():
                copies[part].append(digest)
        several = [copy for copy in copies.values() if len(copy) > 1]
        if several:
            self.equal(COPIES_CHECK, len(several), sum(len(set(copy)) == 1 for copy in several))

    def count_changed(self, run: Run) -> tuple[int, int]:
        """Count the trained tensors, and those of them that final/ has with other values."""
        start_folder, file = "model", "model.safetensors"
        if run.adapter.kind == "lora":
            start_folder, file = "adapter", ADAPTER_WEIGHTS
        start = load_file(self.folder / start_folder / file)
        final = load_file(Path(run.output_dir) / "final" / file)
        changed = 0
        for name, tensor in start.items():
            # The file's type may have fewer bits: a change that rounding hides is none.
            if name in final and not torch.equal(tensor.to(final[name].dtype), final[name]):
                changed += 1
        return len(start), changed


def digests_of(trainer: Trainer) -> dict[PartOfTensor, str]:
    """sha256 of what this rank holds of trained weights and optimizer state."""
    session = trainer.session
    tensors = dict(session.model.trained_parameters()) | session.optimizer.state_dict()
    digests = {}
    for name, tensor in tensors.items():
        place = tuple((part.start, part.stop) for part in local_slices(tensor))
        values = local_part(tensor).detach().float().cpu().numpy()
        digests[name, place] = hashlib.sha256(values.tobytes()).hexdigest()
    return digests


def take_steps(run: Run, ranks: Ranks, make_mesh: MakeMesh = Mesh.of) -> Trainer:
    """Train `run` as `train` does but without a word; a collective call.

    A resumed run writes nothing at its end.
    """
    out = Path(run.output_dir)
    # All ranks look which of them see the folder: a collective call.
    ranks = find_run_dir_writers(ranks, out, lambda: out.mkdir(exist_ok=True))
    with stderr_only_from("tunesmith.data"):
        start = decide_start(run, ranks)
        session = build(run, start, ranks=ranks, make_mesh=make_mesh)
    with ranks.raise_on_all_ranks():
        if ranks.is_run_dir_writer and not start.progress:
            write_identity(session, None)
    stop = StopControl(StopRequest(), out, ranks)
    trainer = Trainer(session, start, Sinks([]), stop)
    if start.progress:
        with session.loader(trainer.first_step) as loader:
            for _ in trainer.steps(loader):
                pass
    else:
        trainer.fit()
    if isinstance(trainer.checkpoints.writer, RanksWriter):
        # Groups of a writer live until the process ends, and selfcheck makes one for each kind.
        dist.destroy_process_group(trainer.checkpoints.writer.ranks.group)
    return trainer


def run_checks(on_row: Callable[[CheckRow], None]) -> Report:
    """Check this process and the ranks that it was started with; the report, on every rank.

    Rank 0 takes the steps of one process before it joins the others.

    Args:
        on_row: takes each row on rank 0.
    """
    env = started_as() or {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    began = time.monotonic()
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(
                    prefix="tunesmith-selfcheck-", ignore_cleanup_errors=True
                )
            )
        )
        check = SelfCheck(folder, env["WORLD_SIZE"], on_row)
        if check.device.type == "cuda":
            choose_gpu(env["LOCAL_RANK"], env.get("LOCAL_WORLD_SIZE", 1))
        # The references need one process: rank 0 makes them before the ranks join.
        if env["RANK"] == 0:
            write_inputs(check.folder, STEPS * check.batch)
            for kind in check.kinds:
                with check.on(kind, ONE, ONE_PROCESS):
                    check.reference(kind)
                    check.check_mesh(kind, ONE, ONE_PROCESS)
        with join_ranks() as ranks:
            # From here on all ranks use rank 0's folder and what is left to check.
            check.folder, check.kinds = ranks.broadcast_object((folder, check.kinds))
            with ranks.raise_on_all_ranks():
                # On a disk that rank 0 does not see.
                if ranks.local_rank == 0 and not check.folder.exists():
                    check.folder.mkdir()
                    stack.callback(shutil.rmtree, check.folder, ignore_errors=True)
                    write_inputs(check.folder, STEPS * check.batch)
            if ranks.world > 1:
                check_meshes(check, ranks)
            rows = ranks.broadcast_object(check.rows)
    return {
        "passed": all(row["passed"] for row in rows),
        "ranks": ranks.world,
        "device": torch.cuda.get_device_name() if check.device.type == "cuda" else "CPU",
        "hosts": sorted({*ranks.hosts} - {""}) or ["localhost"],
        "seconds": round(time.monotonic() - began, 1),
        "checks": rows,
    }


def check_meshes(check: SelfCheck, ranks: Ranks) -> None:
    """The checks of several ranks; a collective call."""
    # Ranks with different software end here, as those of a run do.
    check_same_recipe(check.recipe(check.kinds[0], ONE, count=1), ranks)
    # The largest tensor group must fit on the smallest node.
    node = math.gcd(*ranks.all_gather_object(ranks.local_world))
    for shape in meshes_of(ranks.world, node):
        for kind in check.kinds:
            with check.on(kind, shape, ranks):
                check.check_mesh(kind, shape, ranks)
