"""Learning rate schedule: linear warm-up, then decay by the progress of the run."""

import math

from tunesmith.config.schema import Train


def warmup_steps(train: Train, total: int | None, steps_per_epoch: float) -> int:
    """Return the number of warm-up steps.

    If the recipe gives the duration of the run as time, a warm-up in percent is a percentage of the
    steps of one epoch.

    Args:
        total: optimizer steps of the run. None if its duration is given as time.
    """
    amount = train.warmup.amount
    if train.warmup.unit == "steps":
        return int(amount)
    if train.warmup.unit == "epochs":
        return math.ceil(steps_per_epoch * amount)
    whole = steps_per_epoch if total is None else total
    return math.ceil(whole * (amount / 100))


def learning_rate(train: Train, step: int, *, warmup: int, progress: float) -> float:
    """Return the learning rate of one step.

    Args:
        step: step number from 0.
        warmup: number of steps in which the rate increases linearly. Step `warmup - 1` is the first
            step with the maximum rate.
        progress: completed fraction of the steps after the warm-up, from 0 to 1. If the duration is
            given as time, the fraction of the entire time, so that the rate falls a little at the
            end of the warm-up.
    """
    if step < warmup:
        # Add 1, so that the first step has a rate above 0 and step `warmup - 1` has the maximum
        # rate.
        return train.learning_rate * (step + 1) / warmup
    lowest = train.min_learning_rate
    span = train.learning_rate - lowest
    share_left = 1.0 - min(max(progress, 0.0), 1.0)
    if train.schedule == "linear":
        return lowest + span * share_left
    if train.schedule == "cosine":
        return lowest + span * 0.5 * (1.0 - math.cos(math.pi * share_left))
    return train.learning_rate


def scheduled_rate(
    train: Train, step: int, *, total: int | None, steps_per_epoch: int, seconds: float
) -> float:
    """Return the learning rate of one step from the progress of the run.

    Args:
        step: step number from 0.
        total: optimizer steps of the run. None if its duration is given as time.
        seconds: training time so far.
    """
    warmup = warmup_steps(train, total, steps_per_epoch)
    if total is None:
        progress = seconds / (train.duration.seconds or 1.0)
    else:
        progress = (step - warmup) / max(1, total - warmup)
    return learning_rate(train, step, warmup=warmup, progress=progress)
