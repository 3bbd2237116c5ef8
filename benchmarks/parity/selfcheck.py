"""Compare training on several ranks with training in one process, step by step.

    torchrun --nproc-per-node 2 benchmarks/parity/selfcheck.py
    # two nodes; print the rows of the table as JSON
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint NODE:29500 \\
        benchmarks/parity/selfcheck.py --json

The ranks train once on each kind of mesh (replicate, shard, tensor and combinations) that fits
their number. Losses, gradient norms, resumed steps, changed parameters and copies of weights are
compared. The inputs are generated and identical on every node: a random Llama model, an adapter
with a random B, and rows. The script takes a minute or two and needs no network. The exit code is 1
if a check fails.
"""

import hashlib
import json
import math
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tunesmith.adapter.peft_files import PLAIN_LORA_CONFIG, PREFIX, write_adapter
from tunesmith.checkpoint.replicate import choose_run_dir_writers
from tunesmith.checkpoint.resume import decide_start
from tunesmith.checkpoint.sharded import RanksWriter
from tunesmith.config.load import from_mapping
from tunesmith.config.names import last_part
from tunesmith.config.schema import Run
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks, choose_gpu, join_ranks, started_as
from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import EXIT_FAILED, EXIT_OK, MachineError
from tunesmith.formats.nf4 import check_nf4
from tunesmith.host.logger import stderr_only_from
from tunesmith.host.signals import StopRequest
from tunesmith.metrics.record import StepRecord
from tunesmith.metrics.sink import Sinks
from tunesmith.model.weights.safetensors_files import ADAPTER_WEIGHTS
from tunesmith.parallel.mesh import ONE, Mesh, MeshShape
from tunesmith.quant.schemes import NF4, scheme_of
from tunesmith.start.agree import check_same_recipe
from tunesmith.start.build import build
from tunesmith.start.request import Request
from tunesmith.training.identity import write_identity
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer

# Kinds of training -> (value of adapter.kind, value of model.quantize).
TRAINING_KINDS = {
    "lora": ("lora", "none"),
    "full": ("none", "none"),
    "nf4 lora": ("lora", "nf4"),
}
STEPS = 4
# Step from whose checkpoint the run resumes. Steps 3 and 4 then run again. Step 4 is needed,
# because wrong optimizer moments change the update of step 3, and thus the loss of step 4.
RESUMED = 2


# (dtype, device) -> two maximum relative differences. The first number applies to the first step
# and to resumed steps, the second number to all other steps.
# fp32: sums have a different order on each mesh. AdamW's first updates have the same size for small
# and large gradients, which can increase a difference. Differences up to 3e-7 were measured on
# CPUs. The limits for GPUs are estimates, because there the order of sums also depends on shapes.
# bf16: intermediate results are rounded to 8 bits, and a different micro batch gives different
# intermediate results. On CPUs, differences up to 4e-4 were measured, and resumed steps were equal.
TOLERANCES = {
    ("fp32", "cpu"): (1e-6, 1e-4),
    ("fp32", "cuda"): (1e-5, 1e-3),
    ("bf16", "cuda"): (5e-3, 1e-2),
}
# Rank and alpha of the adapter.
LORA_RANK = 4
LORA_ALPHA = 8.0
# Lower bound of the divisor of a relative difference, so that an expected value of 0 causes no
# division by 0.
TINY = 1e-30
# Config of the model. Heads, KV heads, widths and nf4 blocks per row are divisible by 8, so that up
# to 8 tensor ranks can share a layer. The 272 token ids are the 256 bytes, an end token and 15
# unused ids.
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
# Name of a check -> likely cause if the check fails. It is printed below the failed check.
MEANING = {
    LOSS_CHECK: "these ranks use a different model or different rows than one process: "
    "wrongly sharded layers, or other weights",
    NORM_CHECK: "gradients are reduced incorrectly over these ranks, "
    "or the norm counts some gradients twice or not at all",
    RESUME_CHECK: "a checkpoint of these ranks lacks some of their state, "
    "or is loaded into the wrong tensors",
    CHANGED_CHECK: "the backward does not reach a trained parameter, "
    "or the optimizer or final/ omits it",
    COPIES_CHECK: "ranks have different values of the same weight or moment: replicas diverge",
}


class Kind(NamedTuple):
    """A kind of training: a name in TRAINING_KINDS and a dtype."""

    name: str
    dtype: str


class CheckRow(TypedDict):
    """One row of the table, in the format of --json.

    `step` is the step at which `expected` and `found` were recorded.
    """

    check: str
    mesh: MeshShape | None
    step: int | None
    expected: str
    found: str
    tolerance: str
    passed: bool
    meaning: str


# Shard of a tensor: the tensor's name, and for each dimension the start and end index.
PartOfTensor = tuple[str, tuple[tuple[int, int], ...]]


def meshes_of(world: int, node: int) -> list[MeshShape]:
    """Return one mesh shape for each kind of mesh.

    Two shapes are of the same kind if the same dimensions are larger than 1. Of each kind, return
    the shape with the largest tensor dimension. If several shapes have the same tensor dimension,
    return the shape with the largest shard dimension.

    Args:
        world: the number of ranks.
        node: the number of ranks per node, which a tensor group must not exceed.
    """
    meshes = {}
    for tensor in (1, 2, 4, 8):
        for shard in range(1, world + 1):
            if node % tensor == 0 and world % (shard * tensor) == 0:
                shape = MeshShape(world // (shard * tensor), shard, tensor)
                # Replace an earlier shape of the same kind, because later shapes have larger tensor
                # and shard dimensions.
                meshes[tuple(size > 1 for size in shape)] = shape
    return list(meshes.values())


def write_inputs(folder: Path, count: int) -> None:
    """Write the folders model and adapter and the file rows.jsonl into an existing folder.

    Args:
        count: the number of rows.
    """
    weights = write_model(folder / "model")
    (folder / "adapter").mkdir()
    tensors: dict[str, torch.Tensor] = {}
    targets = set()
    for key, weight in weights.items():
        if "layers" not in key or weight.dim() != 2:
            continue
        name = key.removesuffix(".weight")
        outputs, inputs = weight.shape
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(LORA_RANK, inputs) / inputs**0.5
        # Use a random B instead of zeros. With B = 0 all gradients of A are 0, so the checks would
        # not detect a layer that gets no gradient by mistake.
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(outputs, LORA_RANK) / outputs**0.5
        targets.add(last_part(name))
    settings = {"r": LORA_RANK, "lora_alpha": LORA_ALPHA, "target_modules": sorted(targets)}
    write_adapter(folder / "adapter", tensors, PLAIN_LORA_CONFIG | settings)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for i in range(count):
            # Vary the length and the increment of the number sequences, so that rows have different
            # numbers of tokens.
            step = i % 7 + 1
            numbers = " ".join(str(i + k * step) for k in range(4 + i % 9))
            row = {"prompt": f"Count from {i} by {step}: ", "completion": numbers}
            file.write(json.dumps(row) + "\n")


def write_model(folder: Path) -> dict[str, torch.Tensor]:
    """Write a Llama model with the config SHAPE and random weights. Return the weights.

    The tokenizer has one token per byte.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # Use each byte as a token and no merges, so that no vocabulary file is needed.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.save_pretrained(folder)
    # Set the seed, so that the weights are equal on each machine and in each call.
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=256, pad_token_id=256))
    model.config.save_pretrained(folder)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file(weights, folder / "model.safetensors")
    return weights


class SelfCheck:
    """Runner of the checks on one rank. It also collects the results.

    Args:
        folder: a folder with the same path on all nodes.
        world: the number of ranks.
        on_row: a function that is called with each row of the table. Only rank 0 has rows.
    """

    def __init__(self, folder: Path, world: int, on_row: Callable[[CheckRow], None]) -> None:
        self.folder = folder
        self.on_row = on_row
        # Number of examples per step.
        self.batch = max(8, 2 * world)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Check fp32, which has the smaller tolerance. On GPUs also check bf16, which uses the
        # kernels of a real run.
        dtypes = [dtype for dtype in ("fp32", "bf16") if (dtype, self.device.type) in TOLERANCES]
        names = [*TRAINING_KINDS]
        try:
            check_nf4(self.device)
        except MachineError:
            # Skip nf4, because the package that it needs is not installed.
            names.remove("nf4 lora")
        self.kinds = [Kind(name, dtype) for dtype in dtypes for name in names]
        self.rows: list[CheckRow] = []
        # Records of training in one process with one micro batch per step.
        self.reference_records: dict[Kind, list[StepRecord]] = {}
        # Prefix and mesh that `add` writes into each new row of the table.
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
        """Add a row to the table.

        Args:
            limit: the tolerance as text.
        """
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
        """Add a row to the table. Its check passes if the two values are equal."""
        self.add(check, expected, actual, expected == actual)

    def compare(
        self,
        check: str,
        names: Sequence[str],
        expected: list[StepRecord],
        actual: list[StepRecord],
        limits: Sequence[float],
    ) -> None:
        """Compare records, and add a row for the value with the largest difference.

        The difference of a value is divided by the limit of its step, so that steps with different
        limits are comparable.

        Args:
            names: the fields of the records to compare.
            limits: the maximum relative difference of each step.
        """
        figures = []
        for reference, record, allowed in zip(expected, actual, limits, strict=True):
            for name in names:
                value, found = vars(reference)[name], vars(record)[name]
                # If the expected value is 0, divide by TINY, so that any difference fails.
                share = abs(found - value) / max(abs(allowed * value), TINY)
                figures.append((share, reference.step, allowed, value, found))
        share, step, allowed, value, found = max(figures)
        self.add(check, f"{value:.8g}", f"{found:.8g}", share <= 1, step, f"{allowed:.0e}")

    def begin(self, kind: Kind, shape: MeshShape) -> None:
        """Name the kind of training and the mesh in all rows until the next call."""
        what = kind.name if kind.dtype == "fp32" else f"{kind.name} {kind.dtype}"
        self.part = f"{what}, {shape.describe()}: "
        self.mesh = shape

    def recipe(self, kind: Kind, shape: MeshShape, *, count: int) -> Run:
        """Return the recipe of a kind of training on a mesh.

        Args:
            count: the number of micro batches per step on each rank. A rank can get more micro
                batches if `self.batch` is not divisible by `count * shape.data`.
        """
        adapter, quantize = TRAINING_KINDS[kind.name]
        # The global batch is equal on every mesh. Only its division into micro batches differs.
        micro_batch = self.batch // (count * shape.data)
        adapter_values: dict[str, str | float] = {"kind": adapter}
        if adapter == "lora":
            adapter_values |= {"rank": LORA_RANK, "alpha": LORA_ALPHA, "from": "adapter"}
        # Use a separate run directory for each kind and mesh.
        out = "-".join(map(str, (*kind, micro_batch, *shape))).replace(" ", "-")
        # The paths of inputs are relative to `self.folder`.
        values = {
            "model": {"name": "model", "dtype": kind.dtype, "quantize": quantize},
            "adapter": adapter_values,
            "data": {
                "train": {"source": "rows.jsonl", "format": "prompt-completion"},
                "seq_len": 256,
            },
            "train": {
                "duration": f"{STEPS} steps",
                "global_batch": f"{self.batch} examples",
                "compile": "off",
                "micro_batch": f"{micro_batch} examples",
                "schedule": "constant",
                "warmup": "0 steps",
                # Use a large learning rate. The weights of a norm are near 1, where a small update
                # would be lost by rounding to bf16.
                "learning_rate": 4e-3,
            },
            "parallel": shape._asdict(),
            "checkpoint": {"every": f"{RESUMED} steps"},
            "log": {"tensorboard": False, "samples": 0},
            "output_dir": str(self.folder / out),
        }
        return from_mapping(values, where="selfcheck", base=self.folder)

    def check_mesh(self, kind: Kind, shape: MeshShape, ranks: Ranks) -> None:
        """Train on a mesh with two micro batches per step, and compare with the reference.

        This is a collective call.
        """
        run = self.recipe(kind, shape, count=2)
        first, others = TOLERANCES[kind.dtype, self.device.type]
        trainer = take_steps(run, ranks)
        digests = ranks.all_gather_object(digests_of(trainer))
        records = trainer.metrics.records
        if ranks.is_main_process:
            reference = self.reference_records[kind]
            # All meshes start with equal weights, so the first step has the smaller limit. Later
            # steps also include the differences of earlier updates.
            limits = [first] + [others] * (STEPS - 1)
            self.compare(LOSS_CHECK, ["loss"], reference, records, limits)
            self.compare(NORM_CHECK, ["grad_norm"], reference, records, limits)
            self.equal(CHANGED_CHECK, *self.count_changed(run))
            # All ranks with the same shard of a tensor must have equal values.
            copies = defaultdict(list)
            for rank_digests in digests:
                for part, digest in rank_digests.items():
                    copies[part].append(digest)
            several = [copy for copy in copies.values() if len(copy) > 1]
            if several:
                self.equal(COPIES_CHECK, len(several), sum(len(set(copy)) == 1 for copy in several))
        # Do not check the resume of "nf4 lora", because it restores the same tensors as the resume
        # of "lora": a checkpoint holds the adapter but not the base model.
        if scheme_of(run.model) is not NF4:
            self.check_resume(run, ranks, records, first)

    def check_resume(self, run: Run, ranks: Ranks, records: list[StepRecord], limit: float) -> None:
        """Resume from the checkpoint of step RESUMED, and compare the records of the later steps.

        This is a collective call.

        Args:
            records: the records of the first run.
            limit: the maximum relative difference.
        """
        if ranks.local_rank == 0:
            # Remove the checkpoint and the results of the last step, so that the run resumes at
            # RESUMED.
            out = Path(run.output_dir)
            shutil.rmtree(out / f"checkpoint-{STEPS}", ignore_errors=True)
            shutil.rmtree(out / "final", ignore_errors=True)
        ranks.all_gather_object(None)
        resumed = take_steps(run, ranks)
        if ranks.is_main_process:
            names = ["loss", "grad_norm"]
            again = resumed.metrics.records
            self.compare(RESUME_CHECK, names, records[RESUMED:], again, [limit] * len(again))

    def count_changed(self, run: Run) -> tuple[int, int]:
        """Return the number of trained tensors, and the number of those that training has changed.

        The trained values are read from the folder final/ of the run.
        """
        start_folder, file = "model", "model.safetensors"
        if run.adapter.kind == "lora":
            start_folder, file = "adapter", ADAPTER_WEIGHTS
        start = load_file(self.folder / start_folder / file)
        final = load_file(Path(run.output_dir) / "final" / file)
        # Compare in the dtype of the file, so that a change that rounding removes does not count.
        changed = [
            name
            for name in start.keys() & final.keys()
            if not torch.equal(start[name].to(final[name].dtype), final[name])
        ]
        return len(start), len(changed)


def digests_of(trainer: Trainer) -> dict[PartOfTensor, str]:
    """Return the SHA-256 hash of each shard of trained weights and optimizer state on this rank."""
    session = trainer.session
    tensors = dict(session.model.trained_parameters()) | session.optimizer.state_dict()
    digests = {}
    for name, tensor in tensors.items():
        place = tuple((part.start, part.stop) for part in local_slices(tensor))
        values = local_part(tensor).detach().float().cpu().numpy()
        digests[name, place] = hashlib.sha256(values.tobytes()).hexdigest()
    return digests


def take_steps(run: Run, ranks: Ranks) -> Trainer:
    """Train like the command `train`, but print nothing. This is a collective call.

    A resumed run writes no final weights.
    """
    out = Path(run.output_dir)
    # This collective call determines which ranks write to the run directory `out`.
    ranks = choose_run_dir_writers(ranks, out, lambda: out.mkdir(exist_ok=True))
    with stderr_only_from("tunesmith.rows", "tunesmith.tokens"):
        start = decide_start(run, ranks)
        session = build(Request(run, start), ranks)
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
        # Destroy the writer's process group, because each call of this function creates another
        # group, and all groups would exist until the process ends.
        dist.destroy_process_group(trainer.checkpoints.writer.ranks.group)
    return trainer


def run_checks(on_row: Callable[[CheckRow], None]) -> list[CheckRow]:
    """Run all checks on this process and the ranks that were started with it.

    Args:
        on_row: a function that is called with each row of the table on rank 0.

    Returns:
        The rows of the table, on every rank.
    """
    env = started_as() or {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    # Create each mesh only once, because process groups use sockets and memory of NCCL.
    Mesh.of = cache(Mesh.of)
    inputs = tempfile.TemporaryDirectory(prefix="tunesmith-selfcheck-", ignore_cleanup_errors=True)
    with inputs as folder, ExitStack() as stack:
        check = SelfCheck(Path(folder), env["WORLD_SIZE"], on_row)
        if check.device.type == "cuda":
            choose_gpu(env["LOCAL_RANK"], env.get("LOCAL_WORLD_SIZE", 1))
        # Rank 0 trains the reference runs in one process, before the ranks form a process group.
        if env["RANK"] == 0:
            write_inputs(check.folder, STEPS * check.batch)
            for kind in check.kinds:
                check.begin(kind, ONE)
                trainer = take_steps(check.recipe(kind, ONE, count=1), ONE_PROCESS)
                check.reference_records[kind] = trainer.metrics.records
                check.check_mesh(kind, ONE, ONE_PROCESS)
        with join_ranks() as ranks:
            # All ranks use the folder and the kinds of rank 0.
            check.folder, check.kinds = ranks.broadcast_object((check.folder, check.kinds))
            with ranks.raise_on_all_ranks():
                # If this node does not share rank 0's disk, create the inputs on its own disk.
                if ranks.local_rank == 0 and not check.folder.exists():
                    check.folder.mkdir()
                    stack.callback(shutil.rmtree, check.folder, ignore_errors=True)
                    write_inputs(check.folder, STEPS * check.batch)
            if ranks.world > 1:
                check_meshes(check, ranks)
            return ranks.broadcast_object(check.rows)


def check_meshes(check: SelfCheck, ranks: Ranks) -> None:
    """Run the checks on each mesh of several ranks. This is a collective call."""
    # Raise an error if the ranks have different software versions, as at the start of a run.
    check_same_recipe(check.recipe(check.kinds[0], ONE, count=1), ranks)
    # A tensor group must be inside one node, so its size must divide the number of ranks of every
    # node.
    node = math.gcd(*ranks.all_gather_object(ranks.local_world))
    for shape in meshes_of(ranks.world, node):
        for kind in check.kinds:
            check.begin(kind, shape)
            check.check_mesh(kind, shape, ranks)


def print_row(row: CheckRow) -> None:
    """Print a row of the table. For a failed check, also print the likely cause."""
    step = f"step {row['step']}" if row["step"] else ""
    figures = f"{step:>6} {row['expected']:>11} {row['found']:>11} {row['tolerance']:>6}"
    print(f"{row['check']:<76} {figures} {'pass' if row['passed'] else 'FAIL'}", flush=True)
    if row["meaning"]:
        print(f"  {row['meaning']}", flush=True)


def main() -> int:
    began = time.monotonic()
    as_json = "--json" in sys.argv
    rows = run_checks((lambda row: None) if as_json else print_row)
    failed = sum(not row["passed"] for row in rows)
    if (started_as() or {"RANK": 0})["RANK"] == 0:
        seconds = time.monotonic() - began
        summary = f"{failed} of {len(rows)} checks failed, {seconds:.0f} s"
        print(json.dumps(rows, indent=1) if as_json else summary)
    return EXIT_FAILED if failed else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
