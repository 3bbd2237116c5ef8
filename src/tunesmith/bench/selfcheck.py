"""`tunesmith selfcheck`: the engine's own steps on one process, and on a mesh of each kind that the ranks can make.

What is trained is made here, alike on every node: a random Llama, an adapter with a drawn B, and rows.
"""

import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tunesmith.adapter.peft_files import PLAIN, PREFIX, WEIGHTS, write_adapter
from tunesmith.checkpoint.replicate import find_dir_leaders
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
from tunesmith.host.signals import StopRequest
from tunesmith.metrics.record import StepRecord
from tunesmith.metrics.sink import Sinks
from tunesmith.parallel.mesh import ONE, Mesh, MeshShape
from tunesmith.quant.nf4 import check_nf4
from tunesmith.quant.schemes import NF4, scheme_of
from tunesmith.training.agree import software_versions
from tunesmith.training.build import build, write_identity
from tunesmith.training.stop_control import StopControl
from tunesmith.training.trainer import Trainer
from tunesmith.units import ratio

# adapter, model.quantize
KINDS = {
    "lora": ("lora", "none"),
    "full": ("none", "none"),
    "nf4 lora": ("lora", "nf4"),
}
# Of a run. Those after RESUMED are taken again from its checkpoint; the last shows the moments
STEPS, RESUMED = (
    4,
    2,
)
# Largest relative difference of the first step, of the others, and of resumed ones. In fp32 meshes differ in the order of
# their sums, and AdamW's first updates, as large for a small gradient as for a large one, may widen that: up to 3e-7 was
# seen. A GPU's kernels choose their order by shape, and attention's varies: its limits are estimates. bf16 rounds to 8
# bits, in other places for another micro batch: up to 4e-4 was seen, on CPUs alone. Resumed steps were equal.
TOLERANCE = {
    ("fp32", "cpu"): (1e-6, 1e-4, 1e-6), ("fp32", "cuda"): (1e-5, 1e-3, 1e-5), ("bf16", "cuda"): (5e-3, 1e-2, 5e-3),
}  # fmt: skip
RANK, ALPHA, MIB = 4, 8.0, 64  # of the adapter; of the all-reduce that is timed
TINY = 1e-30  # in place of a limit of 0
STUCK_SECONDS = 180.0  # that a rank may take without progress: a whole mesh takes seconds
# Heads, KV heads, widths, and the blocks of nf4 in a row are divisible by 8. One token of the 272 is no byte and ends a text.
SHAPE = {
    "vocab_size": 272, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 32, "max_position_embeddings": 256, "tie_word_embeddings": True,
    "bos_token_id": None,
}  # fmt: skip
LOSS, NORM, RESUME, GRADIENTS = (
    "loss",
    "gradient norm",
    "resumed loss and norm",
    "parameters with a gradient",
)
CHANGED, ALIKE, COPIES = "changed parameters", "ranks with equal inputs", "equal copies on ranks"
MEANING = {  # of a check that failed
    LOSS: "these ranks compute another model or other rows than one process: a layer that is cut wrongly, other weights",
    NORM: "gradients are not summed over these ranks as they must be, or the norm counts some twice or not at all",
    RESUME: "a checkpoint of these ranks lacks a part of their state, or it is read into other places",
    GRADIENTS: "the backward does not reach a part of the adapter",
    CHANGED: "a trained parameter gets no gradient, or the optimizer or final/ leaves it out",
    ALIKE: "a rank reads other rows or another base than one process does",
    COPIES: "ranks hold other values of the same weight or moment: copies drift apart",
}
Kind = tuple[str, str]  # of KINDS, dtype
MakeMesh = Callable[[MeshShape, str], Mesh]


@dataclass(frozen=True)
class CheckRow:
    """One line of the table; `passed` is None for a figure without a verdict, `step` that of the figures."""

    check: str
    mesh: MeshShape | None
    step: int | None
    expected: str
    found: str
    tolerance: str
    passed: bool | None
    meaning: str


def meshes_of(world: int, node: int) -> list[MeshShape]:
    """One mesh of several ranks for each choice of dimensions that are larger than 1: with the largest tensor group on a
    `node` of so many, then the most shards, so that on nodes of 8 ranks either is a node."""
    tensors = [tensor for tensor in (1, 2, 4, 8) if node % tensor == 0]
    sizes = [
        (shard, tensor)
        for tensor in tensors
        for shard in range(1, world + 1)
        if world % (shard * tensor) == 0
    ]
    shapes = [MeshShape(world // (shard * tensor), shard, tensor) for shard, tensor in sizes]
    return [*{tuple(size > 1 for size in shape): shape for shape in shapes}.values()]


def write_inputs(folder: Path, count: int) -> None:
    """Write model/, adapter/ and rows.jsonl, with `count` rows, into an existing folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=256, pad_token_id=256))
    model.config.save_pretrained(folder / "model")
    save_file(
        {name: p.detach() for name, p in model.named_parameters()},
        folder / "model" / "model.safetensors",
    )
    layers = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and "layers" in name
    }
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        outputs, inputs = layer.weight.shape
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(RANK, inputs) / inputs**0.5
        # With B = 0 the gradient of A would be zero, and a layer that gets none would look like the others.
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(outputs, RANK) / outputs**0.5
    settings = {
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted({name.rsplit(".")[-1] for name in layers}),
    }
    (folder / "adapter").mkdir()
    write_adapter(folder / "adapter", tensors, PLAIN | settings)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for i in range(count):
            numbers = " ".join(str(i + k * (i % 7 + 1)) for k in range(4 + i % 9))
            file.write(
                json.dumps({"prompt": f"Count from {i} by {i % 7 + 1}: ", "completion": numbers})
                + "\n"
            )


class SelfCheck:
    """The checks of one rank, in `folder`, a path that is the same on all nodes; rank 0 alone has `rows`."""

    def __init__(self, folder: Path, world: int, say: Callable[[CheckRow], None]) -> None:
        self.folder, self.say = folder, say
        self.batch = max(8, 2 * world)  # examples of a step
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # fp32 has the tighter tolerance; on GPUs bf16 takes the kernels of a real run.
        dtypes = [dtype for dtype in ("fp32", "bf16") if (dtype, self.device.type) in TOLERANCE]
        self.kinds = [(name, dtype) for dtype in dtypes for name in KINDS]
        # Once for all runs on it: its process groups take sockets and NCCL's memory
        self.make_mesh = cache(Mesh.of)
        self.rows: list[CheckRow] = []
        self.alone: dict[Kind, list[StepRecord]] = {}  # of one process with one micro batch a step
        self.inputs: dict[Kind, Any] = {}  # of its first step
        self.part = ""  # what the next rows are of
        self.mesh: MeshShape | None = None

    def add(
        self,
        check: str,
        expected: object,
        found: object,
        passed: bool | None,
        step: int | None = None,
        limit: str = "",
    ) -> None:
        """A row of the table."""
        name, meaning = f"{self.part}{check}", MEANING.get(check, "") if passed is False else ""
        self.rows.append(
            CheckRow(name, self.mesh, step, str(expected), str(found), limit, passed, meaning)
        )
        self.say(self.rows[-1])

    def equal(self, check: str, expected: object, found: object) -> None:
        """A row whose sides must be equal."""
        self.add(check, expected, found, expected == found)

    def compare(
        self,
        check: str,
        names: Sequence[str],
        before: list[StepRecord],
        now: list[StepRecord],
        *limits: float,
    ) -> None:
        """A row with the step and figure that differ most, as a share of the limit: of step 1, of others."""
        pairs = [(a, b, name) for a, b in zip(before, now, strict=True) for name in names]
        figures = [
            (limits[a.step > 1], a.step, vars(a)[name], vars(b)[name]) for a, b, name in pairs
        ]
        limit, step, one, other = max(
            figures, key=lambda f: abs(f[3] - f[2]) / max(abs(f[0] * f[2]), TINY)
        )
        passed = abs(other - one) <= abs(limit * one)
        self.add(check, f"{one:.8g}", f"{other:.8g}", passed, step, f"{limit:.0e}")

    @contextmanager
    def on(self, kind: Kind, shape: MeshShape, ranks: Ranks) -> Iterator[None]:
        """What is told, fails or hangs inside bears the name of what is trained, and on which mesh."""
        what = kind[0] if kind[1] == "fp32" else " ".join(kind)
        self.part, self.mesh = f"{what}, {shape.describe()}: ", shape
        ranks.heartbeat.part, ranks.heartbeat.longest = self.part, STUCK_SECONDS
        ranks.heartbeat.phase("build")
        try:
            yield
        except OtherRankError:
            raise
        except Exception as error:
            if isinstance(error, AGREED) and not ranks.leads:  # all raise it, and rank 0 tells it
                raise OtherRankError(str(error), exit_code=EXIT_FAILED) from error
            text = f"{type(error).__name__}: {first_line(error)}"
            told = error if isinstance(error, TunesmithError) else RunError(text)
            fix = (
                told.fix
                or "TUNESMITH_DEBUG=1 shows where; `parallel` of a recipe chooses another mesh"
            )
            raise RunError(
                f"{self.part}{told.what}", where=told.where, why=told.why, fix=fix
            ) from error
        self.part, self.mesh = "", None

    def drop_nf4(self) -> list[Kind]:
        """The kinds that can be trained here: those with nf4 need a package."""
        try:
            check_nf4(self.device)
        except MachineError as error:
            self.kinds = [kind for kind in self.kinds if KINDS[kind[0]][1] == "none"]
            self.add("nf4 is not checked", "", error.what, None)
        return self.kinds

    def recipe(self, kind: Kind, shape: MeshShape, *, count: int) -> Run:
        """LoRA or full fine-tuning on a mesh, where each rank takes so many micro batches a step, or more."""
        (adapter, quantize), dtype, micro = (
            KINDS[kind[0]],
            kind[1],
            self.batch // (count * shape.data),
        )
        start = (
            {"rank": RANK, "alpha": ALPHA, "from": str(self.folder / "adapter")}
            if adapter == "lora"
            else {}
        )
        out = "-".join(map(str, (*kind, micro, *shape))).replace(" ", "-")
        values = {
            "model": {"name": str(self.folder / "model"), "dtype": dtype, "quantize": quantize},
            "adapter": {"kind": adapter} | start,
            "data": {
                "train": {"source": str(self.folder / "rows.jsonl"), "format": "prompt-completion"}, "seq_len": 256,
            },
            "train": {
                "duration": f"{STEPS} steps", "global_batch": f"{self.batch} examples", "compile": "off",
                "micro_batch": f"{micro} examples", "schedule": "constant", "warmup": "0 steps",
                "learning_rate": 4e-3,  # in bf16 less would not show on a norm's weight, which is near 1
            },
            "parallel": shape._asdict(),
            "checkpoint": {"every": f"{RESUMED} steps"},
            "log": {"tensorboard": False, "samples": 0},
            "output_dir": str(self.folder / out),
        }  # fmt: skip
        return from_mapping(values, where="selfcheck", base=self.folder)

    def reference(self, kind: Kind) -> None:
        """Train on one process with one micro batch a step; each parameter of an adapter must get a gradient."""
        trainer = take_steps(self.recipe(kind, ONE, count=1), ONE_PROCESS)
        self.alone[kind], self.inputs[kind], session = (
            trainer.metrics.records,
            first_inputs(trainer),
            trainer.session,
        )
        if session.run.adapter.kind == "lora":
            (micro,) = session.loader(0).batch(0).micro
            session.model(micro.to(session.device)).loss.backward()
            grads = [p.grad for name, p in session.model.named_parameters() if "lora_" in name]
            count = sum(grad is not None and bool(grad.any()) for grad in grads)
            self.equal(GRADIENTS, len(load_file(self.folder / "adapter" / WEIGHTS)), count)

    def check_mesh(self, kind: Kind, shape: MeshShape, ranks: Ranks) -> None:
        """Train on a mesh with two micro batches a step, and compare with `reference`; a collective call."""
        run, (first, others, again) = (
            self.recipe(kind, shape, count=2),
            TOLERANCE[kind[1], self.device.type],
        )
        out, trainer = Path(run.output_dir), take_steps(run, ranks, self.make_mesh)
        parts, inputs = ranks.gather(parts_of(trainer)), ranks.gather(first_inputs(trainer))
        if ranks.leads:
            self.compare(LOSS, ["loss"], self.alone[kind], trainer.metrics.records, first, others)
            self.compare(
                NORM, ["grad_norm"], self.alone[kind], trainer.metrics.records, first, others
            )
            self.equal(CHANGED, *map(len, self.trained(run)))
            self.equal(ALIKE, ranks.world, inputs.count(self.inputs[kind]))
            digests: dict[object, list[str]] = {}
            for part, digest in (item for own in parts for item in own.items()):
                digests.setdefault(part, []).append(digest)
            if copies := [same for same in digests.values() if len(same) > 1]:
                self.equal(COPIES, len(copies), sum(len({*same}) == 1 for same in copies))
        # At a resume its base is made as at the start, and its adapter as LoRA's
        if scheme_of(run.model) is NF4:
            return
        if ranks.local_rank == 0:  # as if the last steps had never been
            shutil.rmtree(out / f"checkpoint-{STEPS}", ignore_errors=True)
            shutil.rmtree(out / "final", ignore_errors=True)
        ranks.gather(None)
        resumed = take_steps(run, ranks, self.make_mesh)
        if ranks.leads:
            self.compare(
                RESUME,
                ["loss", "grad_norm"],
                trainer.metrics.records[RESUMED:],
                resumed.metrics.records,
                again,
                again,
            )

    def trained(self, run: Run) -> tuple[list[str], list[str]]:
        """Names of the trained tensors, and of those that final/ has with other values than the start."""
        start, file = (
            ("adapter", WEIGHTS) if run.adapter.kind == "lora" else ("model", "model.safetensors")
        )
        before, after = (
            load_file(self.folder / start / file),
            load_file(Path(run.output_dir) / "final" / file),
        )
        changed = [
            n
            for n, t in before.items()
            if n in after and not torch.equal(t.to(after[n].dtype), after[n])
        ]
        return [*before], changed

    def compare_builds(self, ranks: Ranks) -> None:
        """All ranks must run the same code; a collective call."""
        own = {name: part.text for name, part in software_versions().items()}
        first, *others = ranks.gather(own)
        if ranks.leads:
            for rank, other in enumerate(others, 1):
                for name in (name for name in first | other if first.get(name) != other.get(name)):
                    self.equal(f"{name} of {ranks.name(rank)}", first.get(name), other.get(name))
            self.equal("ranks with the software of rank 0", ranks.world, 1 + others.count(first))

    def time_all_reduce(self, ranks: Ranks) -> None:
        """Its bus bandwidth as nccl-tests define it: what each rank sends, and receives, in a ring."""
        data, seconds = torch.ones(MIB << 18, device=self.device), []
        for _ in range(4):  # the first one connects
            ranks.gather(None)
            began = time.perf_counter()
            dist.all_reduce(data)
            data[0].item()  # waits for the device
            seconds.append(time.perf_counter() - began)
        rate = ratio(2 * (ranks.world - 1) / ranks.world * data.nbytes, min(seconds)) / 1e9
        if ranks.leads:
            self.add(f"all-reduce of {MIB} MiB: bus bandwidth", "", f"{rate:.2f} GB/s", None)


def first_inputs(trainer: Trainer) -> Any:
    """Hashes of base and data, and the examples of the first step."""
    return dict(trainer.session.hashes), list(trainer.session.loader(0).batch(0).indices)


def parts_of(trainer: Trainer) -> dict[Any, str]:
    """sha256 of what this rank holds of trained weights and optimizer state, by name and place in the whole tensor."""
    session, found = trainer.session, {}
    for name, tensor in (
        dict(session.model.trained_parameters()) | session.optimizer.state_dict()
    ).items():
        place = tuple((cut.start, cut.stop) for cut in local_slices(tensor))
        found[name, place] = hashlib.sha256(
            local_part(tensor).detach().float().cpu().numpy().tobytes()
        ).hexdigest()
    return found


def take_steps(run: Run, ranks: Ranks, make_mesh: MakeMesh = Mesh.of) -> Trainer:
    """Train `run` as `train` does but without a word; a resumed run writes nothing at its end. A collective call."""
    out = Path(run.output_dir)
    ranks = find_dir_leaders(ranks, out, lambda: out.mkdir(exist_ok=True))
    start = decide_start(run, ranks, warn=lambda text: None)
    session = build(run, start, say=lambda text: None, ranks=ranks, make_mesh=make_mesh)
    with ranks.together():
        if ranks.leads_dir and not start.progress:
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
        dist.destroy_process_group(trainer.checkpoints.writer.ranks.group)
    return trainer


def run_checks(say: Callable[[CheckRow], None]) -> dict[str, Any]:
    """Check this process and the ranks that it was started with; `say` takes each row on rank 0. The report, on every rank.

    Rank 0 takes the steps of one process before it joins the others.
    """
    env = started_as() or {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    leads, began = env["RANK"] == 0, time.monotonic()
    with ExitStack() as stack:
        options: dict[str, Any] = {"prefix": "tunesmith-selfcheck-", "ignore_cleanup_errors": True}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(**options)))
        check = SelfCheck(folder, env["WORLD_SIZE"], say)
        if check.device.type == "cuda":
            choose_gpu(env["LOCAL_RANK"], env.get("LOCAL_WORLD_SIZE", 1))
        if leads:
            write_inputs(check.folder, STEPS * check.batch)
            for kind in check.drop_nf4():
                with check.on(kind, ONE, ONE_PROCESS):
                    check.reference(kind)
                    check.check_mesh(kind, ONE, ONE_PROCESS)
        with join_ranks() as ranks:
            check.folder, check.kinds = ranks.share((folder, check.kinds))
            with ranks.together():
                # On a disk that rank 0 does not see
                if ranks.local_rank == 0 and not check.folder.exists():
                    check.folder.mkdir()
                    stack.callback(shutil.rmtree, check.folder, ignore_errors=True)
                    write_inputs(check.folder, STEPS * check.batch)
            if ranks.world > 1:
                check.compare_builds(ranks)
                for shape in meshes_of(ranks.world, math.gcd(*ranks.gather(ranks.local_world))):
                    for kind in check.kinds:
                        with check.on(kind, shape, ranks):
                            check.check_mesh(kind, shape, ranks)
                check.time_all_reduce(ranks)
            rows = ranks.share(check.rows)
    device = torch.cuda.get_device_name() if check.device.type == "cuda" else "CPU"
    described = {
        "passed": all(row.passed is not False for row in rows),
        "ranks": ranks.world,
        "device": device,
    }
    hosts = sorted({*ranks.hosts} - {""}) or ["localhost"]
    described |= {"hosts": hosts, "seconds": round(time.monotonic() - began, 1)}
    return described | {"checks": [asdict(row) for row in rows]}
