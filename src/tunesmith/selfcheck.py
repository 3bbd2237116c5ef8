"""`tunesmith selfcheck`: the engine's own steps on one process, and on every mesh that the ranks can make.

What is trained is made here, alike on every node: a random Llama, an adapter with a drawn B, and rows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from tunesmith.adapter.peft_files import PLAIN, PREFIX, WEIGHTS, write_adapter
from tunesmith.checkpoint.resume import decide_start
from tunesmith.config.load import from_mapping
from tunesmith.config.schema import Parallel, Run
from tunesmith.data.batch import Batch
from tunesmith.metrics.sink import Sinks
from tunesmith.parallel.mesh import ONE, MeshShape, possible_shapes
from tunesmith.ranks import ONE_PROCESS, Ranks, join_ranks, started_as
from tunesmith.signals import StopRequest
from tunesmith.training.build import build, write_identity
from tunesmith.training.trainer import Trainer

KINDS = {"lora": "lora", "none": "full"}  # of the adapter, and its name here
STEPS, RESUMED = 3, 2  # of a run; its last step is taken again from the checkpoint of step RESUMED
# Largest relative difference of the first step, of the later ones, and of a resumed one. In fp32 meshes differ in the order
# of their sums, and AdamW's first updates, as large for a small gradient as for a large one, may widen that: up to 3e-7
# was seen. bf16 rounds to 8 bits, in other places for another micro batch: up to 4e-4 was seen, on CPUs alone. Resumed
# steps were equal, but a GPU's attention adds up in varying order.
TOLERANCE = {"fp32": (1e-6, 1e-4, 1e-6), "bf16": (5e-3, 1e-2, 5e-3)}
RANK, ALPHA, MIB = 4, 8.0, 64  # of the adapter; of the all-reduce that is timed
# Heads, KV heads and widths are divisible by 8. One token of the 272 is no byte and ends a text.
SHAPE = {
    "vocab_size": 272, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 16,
    "num_key_value_heads": 8, "max_position_embeddings": 256, "tie_word_embeddings": True, "bos_token_id": None,
}  # fmt: skip


@dataclass(frozen=True)
class CheckRow:
    """One line of the table; `passed` is None for a figure without a verdict."""

    check: str
    expected: str
    found: str
    tolerance: str
    passed: bool | None


def write_inputs(folder: Path, count: int) -> None:
    """Write model/, adapter/ and rows.jsonl, with `count` rows, into an existing folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(
        folder / "model"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=256, pad_token_id=256))
    model.config.save_pretrained(folder / "model")
    save_file({name: p.detach() for name, p in model.named_parameters()}, folder / "model" / "model.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    layers = [name for name, module in model.model.named_modules(prefix="model") if isinstance(module, torch.nn.Linear)]
    for name in layers:
        outputs, inputs = model.get_submodule(name).weight.shape
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(RANK, inputs) / inputs**0.5
        # With B = 0 the gradient of A would be zero, and a layer that gets none would look like the others.
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(outputs, RANK) / outputs**0.5
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": sorted({name.rsplit(".")[-1] for name in layers})}
    (folder / "adapter").mkdir()
    write_adapter(folder / "adapter", tensors, PLAIN | settings)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for i in range(count):
            numbers = " ".join(str(i + k * (i % 7 + 1)) for k in range(4 + i % 9))
            file.write(json.dumps({"prompt": f"Count from {i} by {i % 7 + 1}: ", "completion": numbers}) + "\n")


class SelfCheck:
    """The checks of one rank, in `folder`, a path that is the same on all nodes; rank 0 alone has `rows`."""

    def __init__(self, folder: Path, world: int, say: Callable[[CheckRow], None]) -> None:
        self.folder, self.say = folder, say
        self.batch = max(8, 2 * world)  # examples of a step
        self.dtype = "bf16" if torch.cuda.is_available() else "fp32"
        self.rows: list[CheckRow] = []
        self.curves: dict[str, list[list[float]]] = {}  # by kind: of one process with one micro batch a step
        self.texts: set[tuple[int, ...]] = set()  # the examples of its first step

    def add(self, check: str, expected: object, found: object) -> None:
        """A row whose two sides must be equal; with None for `expected` a figure."""
        passed = None if expected is None else expected == found
        self.rows.append(CheckRow(check, str(expected or ""), str(found), "", passed))
        self.say(self.rows[-1])

    def compare(self, check: str, expected: Sequence[float], found: Sequence[float], limits: Sequence[float]) -> None:
        """A row with the value that differs most, as a share of its limit."""
        pairs = zip(expected, found, limits, strict=True)
        share, one, other, limit = max((abs(b - a) / abs(limit * a), a, b, limit) for a, b, limit in pairs)
        self.rows.append(CheckRow(check, f"{one:.8g}", f"{other:.8g}", f"{limit:.0e}", share <= 1.0))
        self.say(self.rows[-1])

    def recipe(self, kind: str, shape: MeshShape, *, micro: int) -> Run:
        """LoRA or full fine-tuning on a mesh, with micro batches of so many examples."""
        start = {"rank": RANK, "alpha": ALPHA, "from": str(self.folder / "adapter")}
        values = {
            "model": {"name": str(self.folder / "model"), "dtype": self.dtype},
            "adapter": {"kind": kind} | (start if kind == "lora" else {}),
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
            "output_dir": str(self.folder / "-".join(map(str, (kind, micro, *shape)))),
        }  # fmt: skip
        return from_mapping(values, where="selfcheck", base=self.folder)

    def reference(self, kind: str) -> None:
        """Train on one process with one micro batch a step; each parameter of the adapter must get a gradient."""
        trainer = take_steps(self.recipe(kind, ONE, micro=self.batch), ONE_PROCESS)
        self.curves[kind] = curve_of(trainer)
        session = trainer.session
        (micro,) = session.loader(0).batch(0).micro
        self.texts = {*texts_of(micro)}
        if kind == "lora":
            session.model(micro.to(session.device)).loss.backward()
            grads = [p.grad for name, p in session.model.named_parameters() if "lora_" in name]
            count = sum(grad is not None and bool(grad.any()) for grad in grads)
            self.add("lora: parameters with a gradient", len(load_file(self.folder / "adapter" / WEIGHTS)), count)

    def check_mesh(self, kind: str, shape: MeshShape, ranks: Ranks) -> None:
        """Train on a mesh with micro batches of one example, and compare with `reference`; a collective call."""
        run, name = self.recipe(kind, shape, micro=1), f"{KINDS[kind]}, {shape.describe()}"
        out, trainer = Path(run.output_dir), take_steps(run, ranks)
        weights = ranks.gather(digest_of([p for _, p in trainer.session.model.trained_parameters()]))
        texts = [text for micro in trainer.session.loader(0).batch(0).micro for text in texts_of(micro)]
        seen = {text for own in ranks.gather(texts) for text in own}
        trained = self.trained(kind, out) if ranks.leads else ([], [])
        if ranks.leads_node:  # as if the last step had never been
            shutil.rmtree(out / f"checkpoint-{STEPS}", ignore_errors=True)
            shutil.rmtree(out / "final", ignore_errors=True)
        ranks.gather(None)
        (again,) = curve_of(take_steps(run, ranks))
        if not ranks.leads:
            return
        (first, later, resumed), one, found = TOLERANCE[self.dtype], self.curves[kind], curve_of(trainer)
        for index, what in enumerate(("loss", "gradient norm")):
            columns = [step[index] for step in one], [step[index] for step in found]
            self.compare(f"{name}: {what}", *columns, [first, later, later])
        self.compare(f"{name}: loss and norm when resumed", found[RESUMED], again, [resumed, resumed])
        self.add(f"{name}: changed parameters", *map(len, trained))
        self.add(f"{name}: examples of the batch", self.batch, len(self.texts & seen))
        if ranks.world > 1:
            self.add(f"{name}: different weights on ranks", 1 if kind == "lora" else shape.shard, len({*weights}))

    def trained(self, kind: str, out: Path) -> tuple[list[str], list[str]]:
        """Names of the trained tensors, and of those that final/ has with other values than the start."""
        start, file = ("adapter", WEIGHTS) if kind == "lora" else ("model", "model.safetensors")
        before, after = load_file(self.folder / start / file), load_file(out / "final" / file)
        return [*before], [
            n for n, t in before.items() if n in after and not torch.equal(t.to(after[n].dtype), after[n])
        ]

    def time_all_reduce(self, ranks: Ranks) -> None:
        """Its bus bandwidth as nccl-tests define it: what each rank sends, and receives, in a ring."""
        data, seconds = torch.ones(MIB << 18, device="cuda" if torch.cuda.is_available() else "cpu"), []
        for _ in range(4):  # the first one connects
            ranks.gather(None)
            began = time.perf_counter()
            dist.all_reduce(data)
            data[0].item()  # waits for the device
            seconds.append(time.perf_counter() - began)
        rate = 2 * (ranks.world - 1) / ranks.world * data.nbytes / min(seconds) / 1e9
        if ranks.leads:
            self.add(f"all-reduce of {MIB} MiB: bus bandwidth", None, f"{rate:.2f} GB/s")


def curve_of(trainer: Trainer) -> list[list[float]]:
    """Loss and gradient norm of each step."""
    return [[record.loss, record.grad_norm] for record in trainer.records]


def texts_of(micro: Batch) -> list[tuple[int, ...]]:
    """The tokens of each example; what follows them is padding."""
    ids, edges = micro.input_ids.flatten().tolist(), micro.cu_seqlens[: micro.examples + 1].tolist()
    return [tuple(ids[start:end]) for start, end in pairwise(edges)]


def digest_of(params: Sequence[torch.Tensor]) -> str:
    """sha256 of what this rank holds of some parameters."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in params]
    return hashlib.sha256(torch.cat([p.detach().float().cpu().flatten() for p in local]).numpy().tobytes()).hexdigest()


def take_steps(run: Run, ranks: Ranks) -> Trainer:
    """Train `run` from where its directory stands, as `train` does but without a word; a collective call."""
    with ranks.together():
        Path(run.output_dir).mkdir(exist_ok=True)
        start = decide_start(run, warn=lambda text: None)
    start = ranks.share(start)
    session = build(run, start, say=lambda text: None, ranks=ranks)
    with ranks.together():
        if ranks.leads:
            write_identity(session, None)
    trainer = Trainer(session, start, Sinks([]), StopRequest())
    trainer.fit()
    return trainer


def run_checks(say: Callable[[CheckRow], None]) -> dict[str, Any]:
    """Check this process and the ranks that it was started with; `say` takes each row on rank 0. The report, on every rank.

    Rank 0 takes the steps of one process before it joins the others.
    """
    env = started_as() or {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    leads, cuda = env["RANK"] == 0, torch.cuda.is_available()
    with tempfile.TemporaryDirectory(prefix="tunesmith-selfcheck-", ignore_cleanup_errors=True) as own:
        check = SelfCheck(Path(own), env["WORLD_SIZE"], say)
        if cuda:
            torch.cuda.set_device(env["LOCAL_RANK"])
        if leads:
            write_inputs(check.folder, STEPS * check.batch)
            for kind in KINDS:
                check.reference(kind)
                check.check_mesh(kind, ONE, ONE_PROCESS)
        with join_ranks() as ranks:
            check.folder = Path(ranks.share(own))
            with ranks.together():
                if ranks.leads_node and not leads:
                    check.folder.mkdir()
                    write_inputs(check.folder, STEPS * check.batch)
            if ranks.world > 1:
                for shape in possible_shapes(Parallel(), ranks.world):
                    for kind in KINDS:
                        check.check_mesh(kind, shape, ranks)
                check.time_all_reduce(ranks)
            rows, hosts = ranks.share(check.rows), ranks.gather(socket.gethostname())
            if ranks.leads_node and not leads:
                shutil.rmtree(check.folder, ignore_errors=True)
        passed, device = all(row.passed is not False for row in rows), torch.cuda.get_device_name() if cuda else "CPU"
    described = {"passed": passed, "ranks": ranks.world, "hosts": sorted({*hosts}), "device": device}
    return described | {"checks": [asdict(row) for row in rows]}
