"""The optimizer against torch's own AdamW, and what a resumed one must do alike."""

import math

import pytest
import torch
from torch import nn

from tunesmith.config.schema import Train
from tunesmith.errors import CheckpointError
from tunesmith.optim import Optimizer, learning_rate, warmup_steps
from tunesmith.optim.update import round_stochastically
from tunesmith.units import Length


def params(dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(0)
    return [("w", nn.Parameter(torch.randn(5, 3).to(dtype))), ("b", nn.Parameter(torch.randn(5).to(dtype)))]


def feed(named: list[tuple[str, nn.Parameter]], step: int) -> None:
    for i, (_, p) in enumerate(named):
        g = torch.Generator().manual_seed(100 * step + i)
        grad = torch.randn(p.shape, generator=g).to(p.dtype)
        (p * grad).sum().backward()


def advance(optimizer: Optimizer, rate: float, number: int) -> torch.Tensor:
    """The update at the end of a step, for gradients that are there."""
    optimizer.begin(rate, number)
    return optimizer.step()


def test_fp32_follows_torch_adamw_with_decay_on_matrices_only() -> None:
    train = Train(learning_rate=1e-2, weight_decay=0.1, clip_norm=None)
    ours, theirs = params(), params()
    optimizer = Optimizer(ours, train)
    reference = torch.optim.AdamW(
        [{"params": [theirs[0][1]], "weight_decay": 0.1}, {"params": [theirs[1][1]], "weight_decay": 0.0}], lr=1e-2
    )
    for step in range(5):
        feed(ours, step)
        feed(theirs, step)
        advance(optimizer, 1e-2, step)
        reference.step()
        reference.zero_grad()
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        # The fused kernel multiplies in another order than the reference's: one rounding of fp32 a step.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_clipping_is_torch_s_and_the_norm_is_taken_before_it() -> None:
    named, other = params(), params()
    optimizer = Optimizer(named, Train(clip_norm=0.5))
    feed(named, 1)
    feed(other, 1)
    wanted = torch.nn.utils.clip_grad_norm_([p for _, p in other], 0.5)
    grads = optimizer.grads()
    norm = advance(optimizer, 0.0, 0)
    assert float(norm) == pytest.approx(float(wanted), rel=1e-6)
    for name, p in other:
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-6, atol=0)


def test_bf16_master_accumulates_in_fp32() -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = Optimizer([("w", weight)], Train(clip_norm=None))
    for value in [1.0] + [2.0**-9] * 64:  # bf16 has 8 bits: 1 + 2^-9 is 1 in it
        (weight * value).sum().backward()
    assert weight.grad is None
    assert float(optimizer.grads()["w"]) == 1.0 + 64 * 2.0**-9


def test_small_updates_survive_in_the_master() -> None:
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = Optimizer([("w", weight)], Train(clip_norm=None))
    for step in range(20):
        weight.sum().backward()
        advance(optimizer, 1e-3, step)  # each update of 1e-3 is below bf16's spacing at 1
    assert float(optimizer.masters["w"].detach()) == pytest.approx(1 - 20e-3, rel=1e-4)
    assert float(weight.detach()) == pytest.approx(1 - 20e-3, abs=2**-8)


def test_stochastic_rounding_keeps_the_expectation_and_passes_nan() -> None:
    value = torch.full((200_000,), 1.0 + 0.3 * 2**-7)
    rounded = round_stochastically(value, torch.Generator().manual_seed(0)).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    share = float((rounded > 1).float().mean())
    assert share == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / len(value)))  # four standard errors
    odd = round_stochastically(torch.tensor([math.nan, math.inf, -math.inf, 0.0]), torch.Generator())
    assert torch.isnan(odd[0])
    assert odd[1:].tolist() == [math.inf, -math.inf, 0.0]


def test_stochastic_updates_follow_fp32_on_average() -> None:
    torch.manual_seed(0)
    start = torch.randn(4096).bfloat16()
    half, full = nn.Parameter(start.clone()), nn.Parameter(start.float())
    ours = Optimizer([("w", half)], Train(clip_norm=None, master_weights="stochastic"))
    theirs = torch.optim.AdamW([full], lr=1e-3, weight_decay=0.0)
    for step in range(50):
        grad = torch.randn(4096, generator=torch.Generator().manual_seed(step)) + 0.5
        half.grad, full.grad = grad.bfloat16(), grad.bfloat16().float()
        advance(ours, 1e-3, step)
        theirs.step()
    drift = half.detach().float() - full.detach()
    # A weight's rounding errors are independent with variance <= spacing^2 / 4; their mean over 4,096 weights is small.
    assert abs(float(drift.mean())) < 5e-4
    moved = float((full.detach() - start.float()).mean())
    assert abs(moved) > 20 * abs(float(drift.mean()))


@pytest.mark.parametrize("masters", ["fp32", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_state_gives_the_same_bits(dtype: torch.dtype, masters: str) -> None:
    train = Train(master_weights=masters)
    whole = params(dtype)
    one = Optimizer(whole, train)
    for step in range(3):
        feed(whole, step)
        advance(one, 1e-3, step)
    saved = {k: v.clone() for k, v in one.state().items()}
    again = [(n, nn.Parameter(p.detach().clone())) for n, p in whole]
    two = Optimizer(again, train)
    two.load(saved, scale=None, good_steps=0, where="here")
    for step in range(3, 6):
        for named, optimizer in ((whole, one), (again, two)):
            feed(named, step)
            advance(optimizer, 1e-3, step)
    for (_, a), (_, b) in zip(whole, again, strict=True):
        assert torch.equal(a, b)


def test_foreign_state_is_refused() -> None:
    optimizer = Optimizer(params(torch.bfloat16), Train())
    with pytest.raises(CheckpointError, match=r"no [bw]\.master"):
        optimizer.load({}, scale=None, good_steps=0, where="here")


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    named = params()
    before = [p.detach().clone() for _, p in named]
    optimizer = Optimizer(named, Train())
    (named[0][1] * math.inf).sum().backward()
    assert not advance(optimizer, 1e-3, 0).isfinite()
    assert all(torch.equal(a, p) for a, (_, p) in zip(before, named, strict=True))


def test_loss_scale_halves_on_overflow_and_leaves_the_gradient_unscaled() -> None:
    named = [("w", nn.Parameter(torch.ones(2)))]
    optimizer = Optimizer(named, Train(clip_norm=None), loss_scale=8.0)
    (named[0][1].sum() * 8.0).backward()
    assert float(advance(optimizer, 1e-3, 0)) == pytest.approx(math.sqrt(2))
    (named[0][1] * math.inf).sum().backward()
    advance(optimizer, 1e-3, 1)
    assert (optimizer.scale, optimizer.good_steps) == (4.0, 0)


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [("constant", [1.0] * 4), ("linear", [1.0, 0.75, 0.5, 0.25]), ("cosine", [1.0, 0.853553, 0.5, 0.146447])],
)
def test_schedules_by_their_formulas(schedule: str, wanted: list[float]) -> None:
    train = Train(learning_rate=1.0, schedule=schedule)
    got = [learning_rate(train, step, warmup=0, progress=step / 4) for step in range(4)]
    assert got == pytest.approx(wanted, abs=1e-6)


def test_warmup_rises_to_the_peak_and_floor_is_kept() -> None:
    train = Train(learning_rate=1.0, min_learning_rate=0.1, schedule="cosine")
    rising = [learning_rate(train, step, warmup=4, progress=0.0) for step in range(5)]
    assert rising == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert learning_rate(train, 9, warmup=4, progress=1.0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("length", "total", "wanted"),
    [(Length(3, "%"), 1000, 30), (Length(100, "steps"), 1000, 100), (Length(1, "epochs"), 1000, 50), (Length(0, "%"), 9, 0),
     (Length(10, "%"), None, 5)],
)  # fmt: skip
def test_warmup_lengths(length: Length, total: int | None, wanted: int) -> None:
    assert warmup_steps(Train(warmup=length), total, 50) == wanted
