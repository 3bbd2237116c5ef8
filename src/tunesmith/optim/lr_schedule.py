"""The learning rate of every step."""

import math

from tunesmith.config.schema import Train


def warmup_steps(train: Train, total: int | None, steps_per_epoch: float) -> int:
    """Optimizer steps of rising learning rate, in a run of `total` steps; None: it ends by the
    clock.

    A percentage of a run that ends by the clock is one of an epoch.
    """
    amount = train.warmup.amount
    if train.warmup.unit == "steps":
        return int(amount)
    if train.warmup.unit == "epochs":
        return math.ceil(steps_per_epoch * amount)
    if total is None:
        return math.ceil(steps_per_epoch * (amount / 100))
    return math.ceil(total * (amount / 100))


def learning_rate(train: Train, step: int, *, warmup: int, progress: float) -> float:
    """The learning rate of one step, counted from 0.

    `warmup`: steps of linear rise; step `warmup - 1` is the first at the peak. `progress`: share of
    the steps after the warm-up so far, 0 to 1.
    """
    if step < warmup:
        # step + 1: the first step has a rate above 0, and step warmup - 1 has the peak.
        return train.learning_rate * (step + 1) / warmup
    span = train.learning_rate - train.min_learning_rate
    share_left = 1.0 - min(max(progress, 0.0), 1.0)
    if train.schedule == "linear":
        return train.min_learning_rate + span * share_left
    if train.schedule == "cosine":
        return train.min_learning_rate + span * 0.5 * (1.0 - math.cos(math.pi * share_left))
    return train.learning_rate


def scheduled_rate(
    train: Train, step: int, *, total: int | None, steps_per_epoch: int, seconds: float
) -> float:
    """The learning rate of one step, from 0, of a run of `total` steps.

    None: it ends by the clock, and is `seconds` old.
    """
    warmup = warmup_steps(train, total, steps_per_epoch)
    if total is None:
        progress = seconds / (train.duration.seconds or 1.0)
    else:
        progress = (step - warmup) / max(1, total - warmup)
    return learning_rate(train, step, warmup=warmup, progress=progress)
