"""Loss curves beside a plain Transformers + PEFT + torch.optim loop: same rows, same order.

In fp32 the two sides round differently (fused products, packed rows, chunked loss), so the bound
grows with the steps: 1e-6 at the first, and 1e-4 after 50 updates. In float64, with norm, rotary
and softmax of both sides in float64, the same formulas agree to 1e-9. More steps and families:
`benchmarks/parity/families_curves.py` and `picture_curves.py`. Adapters that PEFT reads otherwise
than they are trained would differ by 1e-2 from the second step on.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from families_curves import Pair, compare_curves, write_model
from picture_curves import compare_family
from reference import curve, load

from recipes import built_model, make_run, rows
from tunesmith.adapter import peft_files
from tunesmith.batches.batch import collate
from tunesmith.config.schema import Run
from tunesmith.optim.optimizer import Optimizer
from tunesmith.start.run import train
from tunesmith.tokens.text.example import Example
from tunesmith.train_model import TrainModel

pytestmark = pytest.mark.slow

STEPS, BATCH, RATE = 24, 4, 1e-3


def constant(model: Path, folder: Path, kind: str, *, pack: bool = True) -> Run:
    """Fixed order, constant rate, no dropout, no validation."""
    adapter = {"kind": "lora", "rank": 4, "alpha": 8} if kind == "lora" else {"kind": "none"}
    return make_run(
        model, folder, held=False, adapter=adapter, checkpoint={"every": None},
        data={"shuffle": False, "pack": pack, "template": "raw"},
        train={"duration": f"{STEPS} steps", "global_batch": f"{BATCH} examples", "schedule": "constant",
               "warmup": "0 steps", "learning_rate": RATE},
    )  # fmt: skip


def batches(folder: Path) -> list[list[Example]]:
    """The rows of the recipe as this test tokenises them: completion and end token trained."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = []
    for row in rows(48):
        prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
        answer = tokenizer(row["completion"], add_special_tokens=False).input_ids
        answer.append(tokenizer.eos_token_id)
        trained = np.array([False] * len(prompt) + [True] * len(answer))
        examples.append(Example(np.array(prompt + answer, dtype=np.int32), trained))
    whole = examples * (STEPS * BATCH // len(examples) + 1)
    return [whole[i * BATCH : (i + 1) * BATCH] for i in range(STEPS)]


def first_adapter(run: Run, folder: Path) -> Path:
    """The adapter that the run begins with, in PEFT's files."""
    place = folder / "first"
    place.mkdir()
    model = built_model(run, Path(run.model.name)).model
    files = peft_files.adapter_files(model, run.adapter, run.model.name, None)
    peft_files.write_adapter(place, *files)
    return place


def furthest(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Largest relative difference: of the first step, and of all."""
    assert len(ours) == len(theirs) == STEPS
    apart = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    return apart[0], max(apart)


@pytest.mark.parametrize(("kind", "packed"), [("lora", True), ("none", False)])
def test_fp32_curve_is_transformers_and_peft_s(kind, packed, tiny, tmp_path) -> None:
    run = constant(tiny, tmp_path, kind, pack=packed)
    adapter = first_adapter(run, tmp_path) if kind == "lora" else None
    ours = [record.loss for record in train(run, quiet=True).records]
    theirs = curve(load(tiny, adapter, torch.float32), batches(tiny), rate=RATE, pad_id=0)
    first, most = furthest(ours, theirs)
    assert first <= 1e-6
    assert most <= 1e-4
    assert theirs[-1] < theirs[0] - 0.1, "nothing was learnt: the curves agree about nothing"


@pytest.fixture
def all_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' norm and rotary embedding compute in fp32 even in a float64 model."""
    from transformers.models.llama import modeling_llama

    def norm(self, hidden_states):
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    def rotary(self, x, position_ids):
        width = self.config.head_dim
        base = self.config.rope_parameters["rope_theta"]
        exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
        angles = position_ids[..., None].double() * base**-exponent
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", rotary)


def our_curve(model: TrainModel, run: Run, all_batches: list[list[Example]]) -> list[float]:
    """Our parts in float64, which no recipe offers: model, chunked loss, clipping and update."""
    optimizer = Optimizer(model.trained_parameters(), run.train)
    losses = []
    for step, batch in enumerate(all_batches):
        optimizer.start_step(RATE, step)
        laid = collate([batch], length=sum(len(e.ids) for e in batch), pad_id=0)
        loss_sum, count, _ = model(laid)
        loss = loss_sum / count
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.usefixtures("all_float64")
@pytest.mark.parametrize("kind", ["lora", "none"])
def test_float64_curve_is_the_same_formula(kind: str, tiny: Path, tmp_path: Path) -> None:
    run = constant(tiny, tmp_path, kind)
    adapter = first_adapter(run, tmp_path) if kind == "lora" else None
    ours = our_curve(built_model(run, tiny).double().train(), run, batches(tiny))
    theirs = curve(load(tiny, adapter, torch.float64), batches(tiny), rate=RATE, pad_id=0)
    first, most = furthest(ours, theirs)
    assert first <= 1e-12
    assert most <= 1e-9


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [("nemotron_h", "lora"), pytest.param("falcon", "lora", marks=pytest.mark.nightly)],
)  # fmt: skip
def test_five_steps_are_transformers_and_peft_s(model_type: str, kind: str, tmp_path: Path) -> None:
    model = write_model(model_type, tmp_path / model_type)
    options = Namespace(steps=5, batch=2, seq=128)
    result = compare_curves(Pair(model, tmp_path / kind, kind, options), 5)
    assert len(result["ours"]) == len(result["plain"]) == 5
    assert result["difference"]["first"] <= 1e-6
    assert result["difference"]["all"] <= 1e-5
    assert result["plain"][-1] < result["plain"][0] - 0.1


# M-RoPE with features for several layers; pictures that see both ways; tiles, of a picture alone.
@pytest.mark.parametrize(
    ("family", "kind", "steps", "projector"),
    [
        ("qwen3_vl", "lora", 5, True),
        pytest.param("gemma3", "lora", 5, True, marks=pytest.mark.nightly),
        pytest.param("qwen3_vl", "none", 5, True, marks=pytest.mark.nightly),
    ],
)
def test_losses_and_weights_are_transformers_and_peft_s(family, kind, steps, projector, tmp_path):
    result = compare_family(family, tmp_path, kind, steps, projector=projector)
    assert len(result["ours"]) == len(result["plain"]) == steps
    assert result["difference"]["first"] <= 1e-6
    assert result["difference"]["all"] <= 1e-5
    assert result["weights"] <= 1e-5
    # What the figures are worth: pictures count, and much is learnt.
    assert result["pictures"] > 1e-3
    assert result["plain"][-1] < result["plain"][0] - 0.1
