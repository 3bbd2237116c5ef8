"""Forecast of the tokens per second of the goals on one GPU, computed without a GPU.

    python benchmarks/speed/forecast.py [--device h200|h100|gb10] [--json FILE]
    # Use the rates that a GPU session measured:
    python benchmarks/speed/forecast.py --measured results.json
    # Compare each term with the profiles of a GPU session:
    python benchmarks/speed/forecast.py --beside results.json

The time of a step is the sum of the times of its kernels. The micro batch and the number of
recomputed layers are those that `train` plans for the device. count_kernels.py counts the kernels
of the layers. The functions below add the head, the optimizer and attention. The rates are in
gpu_rates.py; --assume NAME=NUMBER replaces a rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from count_kernels import Count, Term, count_layer, recipe
from gpu_goals import GOALS, MIXTURES, Goal, device_key
from gpu_rates import (
    ATTENTION_CHANNELS,
    ATTENTION_LAYERS,
    ATTENTION_TOKENS,
    MACHINES,
    RATES,
    Rates,
    read_results,
    with_measured,
)
from kernel_terms import ATTENTION, OTHER, PRODUCTS, SKINNY, TERMS

from tunesmith.config.schema import Run
from tunesmith.host.chips import CHIPS
from tunesmith.loss import chunk_size, even_chunk_size
from tunesmith.model.arch.shapes import find_shape
from tunesmith.model.arch.spec import ModelSpec
from tunesmith.model.measuring.measured_spec import model_spec
from tunesmith.planning.forecast import plan_on_paper
from tunesmith.planning.machines import read_cluster
from tunesmith.planning.measured_layers import count_adapter
from tunesmith.planning.workload import measure_work
from tunesmith.units import Size

SUPERVISED = 0.74  # fraction of supervised tokens in alpaca rows with a chat template
DOCUMENT = 205  # tokens of such a row
HEAD, OPTIMIZER = "head and loss", "optimizer"
LAYER_KERNELS = "other kernels of the layers"
NAMED_IN_PROFILE = (PRODUCTS, SKINNY, ATTENTION)


@dataclass(frozen=True)
class Layout:
    """The micro batches of a step.

    Attributes:
        tokens: tokens per micro batch.
        micro_batches: number of micro batches.
        recomputed_layers: number of recomputed layers.
    """

    tokens: int
    micro_batches: int
    recomputed_layers: int


@dataclass(frozen=True)
class Setting:
    """The device of a forecast, a key of RATES, and its rates."""

    device: str
    rates: Rates


@dataclass
class Forecast:
    """The terms of one step on a device, by name. `head_products` is included in the term HEAD."""

    tokens: int
    terms: dict[str, Term]
    head_products: Term

    @property
    def ms(self) -> float:
        return sum(term.ms for term in self.terms.values())

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.tokens / self.ms


def read_shape(goal: Goal) -> ModelSpec:
    return model_spec(find_shape(goal.shape).config, where=goal.shape)


def goal_recipe(goal: Goal) -> Run:
    """Return the recipe that `tunesmith bench --shape` measures, with packed rows."""
    run = recipe(goal.base, full=goal.full, target=goal.target)
    batch = Size(goal.global_batch, "tokens")
    return replace(run, train=replace(run.train, global_batch=batch))


def plan_layout(goal: Goal, setting: Setting) -> Layout:
    """Return the layout that `train` chooses from its estimate, before its trial on the GPU."""
    run, spec = goal_recipe(goal), read_shape(goal)
    cluster = read_cluster(MACHINES[setting.device])
    planner = plan_on_paper(run, spec, cluster, measure_work(run, spec, None))
    plan = planner.choose()
    tokens = plan.memory.tokens
    return Layout(tokens, math.ceil(run.train.global_batch.amount / tokens), plan.recomputed_layers)


def layout_of_report(goal: Goal, figures: Mapping[str, Any]) -> Layout | None:
    """Return the layout of a measured run. Return None if its figures do not contain it."""
    micro_batch, recomputed_layers = figures.get("micro_batch"), figures.get("recomputed_layers")
    if micro_batch is None or recomputed_layers is None:
        return None
    tokens = int(micro_batch.split()[0])
    batch = goal_recipe(goal).train.global_batch.amount
    return Layout(tokens, math.ceil(batch / tokens), recomputed_layers)


class LayerKey(NamedTuple):
    """The arguments of `count_goal_layer`, which determine the kernels of a layer."""

    shape: str
    base: str
    full: bool
    target: str | tuple[str, ...]
    tokens: int
    recomputed: bool
    by_expert: bool


@cache
def count_goal_layer(key: LayerKey) -> list[Count]:
    """Count the kernels of one layer in both directions. The counts do not depend on the rates."""
    run = recipe(key.base, full=key.full, target=key.target)
    counts = count_layer(
        key.shape, run, tokens=key.tokens, recomputed=key.recomputed, by_expert=key.by_expert
    )
    return [*counts.values()]


def layer_terms(goal: Goal, setting: Setting, layout: Layout) -> dict[str, Term]:
    """Compute the terms of all layers in one micro batch. The term of attention has no time yet."""
    by_expert = not CHIPS[MACHINES[setting.device]].grouped_mm
    layers = len(read_shape(goal).layers)
    terms = {name: Term() for name in TERMS}
    layers_by_kind = {False: layers - layout.recomputed_layers, True: layout.recomputed_layers}
    for recomputed, layer_count in layers_by_kind.items():
        if layer_count == 0:
            continue
        key = LayerKey(
            goal.shape, goal.base, goal.full, goal.target, layout.tokens, recomputed, by_expert
        )
        for count in count_goal_layer(key):
            for name, term in count.terms(setting.rates).items():
                terms[name].add(term, times=layer_count)
    return terms


def attention_term(spec: ModelSpec, rates: Rates, layout: Layout, gib: float) -> Term:
    """Compute the term of attention in a micro batch, scaled from the size of the measurement.

    The operations are those of documents with DOCUMENT tokens: two matmuls in the forward and five
    in the backward, over causal pairs of tokens.

    Args:
        gib: the GiB that the kernels of attention read and write.
    """
    forward, backward = rates.attention_ms
    channels = spec.layers[0].heads * spec.layers[0].head_dim
    size = layout.tokens * spec.depth * channels
    scale = size / (ATTENTION_TOKENS * ATTENTION_LAYERS * ATTENTION_CHANNELS)
    forwards = 1 + layout.recomputed_layers / spec.depth
    operations = 2 * (2 * forwards + 5) * size * DOCUMENT / 2
    return Term(scale * (forwards * forward + backward), operations / 1e12, gib)


def head_terms(goal: Goal, setting: Setting, tokens: int) -> tuple[Term, Term]:
    """Compute two terms for the head and the loss of a micro batch: matmuls, and other kernels.

    They only compute the supervised positions.
    """
    import torch

    spec, rates = read_shape(goal), setting.rates
    card = int(read_cluster(MACHINES[setting.device]).chip.gib * 2**30)
    rows = round(SUPERVISED * tokens)
    largest_chunk = chunk_size(spec.vocab, rows, torch.device("cuda"), trained=goal.full, card=card)
    chunks = -(-rows // even_chunk_size(rows, largest_chunk, tile=128))
    operations = (6 if goal.full else 4) * rows * spec.head_matmul
    # The logits are written once, and read twice: for the log-sum-exp and for the gradient. The
    # gradient is written once.
    moved = 4 * 2 * rows * spec.vocab
    if goal.full:
        # For each chunk, the head's gradient is written in bf16, read, and added to a sum in fp32.
        # At the end, the sum is scaled to bf16 and added to the gradient of the master weights.
        moved += spec.head_matmul * (chunks * (2 + 2 + 8) + 6 + 10)
    products = Term(1e3 * operations / rates.product, operations / 1e12)
    return products, Term(1e3 * moved / rates.memory_bandwidth, 0.0, moved / 2**30)


def optimizer_term(goal: Goal, setting: Setting, layout: Layout) -> Term:
    """Compute the term of the optimizer, from the bytes read and written per trained parameter.

    A step needs 4 bytes for the gradient norm, 8 for clipping and 28 for AdamW. In full fine-tuning
    it needs 6 more for the bf16 copy of the weights. In each micro batch, a hook then adds the bf16
    gradients of the embedding, the norms and the head to the gradients of the master weights. This
    needs 6 bytes in the first micro batch and 10 in later ones. The layers' matmuls accumulate
    their own gradients, so the hook does not process them.
    """
    spec = read_shape(goal)
    if goal.full:
        hooked = spec.parameters - spec.layer_matrices
        moved = spec.parameters * (4 + 8 + 28 + 6) + hooked * (6 + 10 * (layout.micro_batches - 1))
    else:
        moved = count_adapter(spec, goal_recipe(goal).adapter) * (4 + 8 + 28)
    return Term(1e3 * moved / setting.rates.memory_bandwidth, 0.0, moved / 2**30)


def forecast(goal: Goal, setting: Setting, layout: Layout) -> Forecast:
    """Compute the terms of one optimizer step."""
    layers = layer_terms(goal, setting, layout)
    head_products, loss = head_terms(goal, setting, layout.tokens)
    head = Term()
    head.add(head_products)
    head.add(loss)
    of_micro_batch = {
        PRODUCTS: layers[PRODUCTS],
        SKINNY: layers[SKINNY],
        LAYER_KERNELS: layers[OTHER],
        ATTENTION: attention_term(read_shape(goal), setting.rates, layout, layers[ATTENTION].gib),
        HEAD: head,
    }
    terms = {name: Term() for name in of_micro_batch}
    for name, term in of_micro_batch.items():
        terms[name].add(term, times=layout.micro_batches)
    terms[OPTIMIZER] = optimizer_term(goal, setting, layout)
    of_head = Term()
    of_head.add(head_products, times=layout.micro_batches)
    return Forecast(layout.tokens * layout.micro_batches, terms, of_head)


class Row(NamedTuple):
    """A term of a step: the forecast and the measured milliseconds."""

    term: str
    forecast: float
    measured: float

    @property
    def difference(self) -> float:
        return self.measured - self.forecast


def rows_beside(expected: Forecast, report: Mapping[str, Any]) -> list[Row]:
    """Return the terms of a forecast and of a GPU profile.

    A profile does not show which part of the step launched a kernel. Its products include those of
    the head, and its other kernels include the loss and the optimizer. Therefore the forecasts of
    these parts are added. The last row is the time in which no kernel ran: the time of a step
    without the profiler, minus all terms.
    """
    terms, head = expected.terms, expected.head_products.ms
    measured = report["terms_ms_a_step"]
    rest = sum(ms for name, ms in measured.items() if name not in NAMED_IN_PROFILE)
    other = terms[LAYER_KERNELS].ms + terms[HEAD].ms - head + terms[OPTIMIZER].ms
    step = 1e3 * expected.tokens / report["figures"]["tokens_per_second"]
    return [
        Row("products, the head's too", terms[PRODUCTS].ms + head, measured.get(PRODUCTS, 0.0)),
        Row(SKINNY, terms[SKINNY].ms, measured.get(SKINNY, 0.0)),
        Row(ATTENTION, terms[ATTENTION].ms, measured.get(ATTENTION, 0.0)),
        Row("other kernels, loss and optimizer too", other, rest),
        Row("no kernel", 0.0, step - sum(measured.values())),
    ]


def print_beside(goal: Goal, layout: Layout, rows: Sequence[Row]) -> None:
    """Print a table of the rows, and the term with the largest difference to its forecast."""
    total = Row("a step", sum(row.forecast for row in rows), sum(row.measured for row in rows))
    print(f"\n{goal.title}: {describe_layout(layout, len(read_shape(goal).layers))}\n")
    print("| term | forecast, ms | measured, ms | measured / forecast |")
    print("|---|---|---|---|")
    for row in (*rows, total):
        ratio = f"{row.measured / row.forecast:.2f}" if row.forecast else "-"
        print(f"| {row.term} | {row.forecast:,.1f} | {row.measured:,.1f} | {ratio} |")
    furthest = max(rows, key=lambda row: abs(row.difference))
    direction = "more" if furthest.difference > 0 else "less"
    distance = f"{abs(furthest.difference):,.1f} ms {direction} than forecast"
    print(f"\nThe largest difference: {furthest.term}, {distance}.")


def describe_layout(layout: Layout, layers: int) -> str:
    count = f"{layout.micro_batches} micro batches" if layout.micro_batches > 1 else "1 micro batch"
    recomputed = f"{layout.recomputed_layers} of {layers} layers recomputed"
    return f"{count} of {layout.tokens:,} tokens, {recomputed}"


def print_rates(device: str, rates: Rates) -> None:
    """Print each rate and its source."""
    print(f"\nRates of the {device.upper()}:")
    for name, source in rates.sources.items():
        value = getattr(rates, name)
        values = value if isinstance(value, tuple) else (value,)
        figure = ", ".join(f"{number:.4g}" for number in values)
        print(f"  {name} {figure}: {source}")


def compare_with_results(
    results: Mapping[str, Any],
    goals: Sequence[Goal],
    setting: Setting,
) -> dict[str, Any]:
    """Print each goal's profile next to a forecast with the layout of the profiled run.

    Return the rows by the goal's title.
    """
    rows_by_title = {}
    for goal in goals:
        report = results["steps"].get(f"{goal.step}-profile", {}).get("report") or {}
        figures = report.get("figures", {})
        if not report.get("terms_ms_a_step") or not figures.get("tokens_per_second"):
            print(f"\n{goal.title}: these results have no profile {goal.step}-profile")
            continue
        layout = layout_of_report(goal, figures) or plan_layout(goal, setting)
        rows = rows_beside(forecast(goal, setting, layout), report)
        print_beside(goal, layout, rows)
        rows_by_title[goal.title] = [row._asdict() for row in rows]
    return rows_by_title


def print_forecasts(goals: Sequence[Goal], setting: Setting) -> dict[str, Any]:
    """Print a table with a row for each goal. Return the details by the goal's title."""
    names = (PRODUCTS, SKINNY, LAYER_KERNELS, ATTENTION, HEAD, OPTIMIZER)
    head = ("ms a step", "micro batch", "recomputed", *names, "tokens/s", "goal", "of the goal")
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|")
    report_by_title = {}
    for goal in goals:
        layout = plan_layout(goal, setting)
        step = forecast(goal, setting, layout)
        speed = step.tokens_per_second
        target = goal.tokens_per_second.get(setting.device)
        cells = [
            goal.title,
            f"{layout.micro_batches} x {layout.tokens:,}",
            f"{layout.recomputed_layers} of {len(read_shape(goal).layers)}",
            *(f"{step.terms[name].ms:,.0f}" for name in names),
            f"{speed:,.0f}",
            f"{target:,}" if target else "-",
            f"{speed / target:.0%}" if target else "-",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
        report_by_title[goal.title] = {
            "layout": vars(layout),
            "terms": {name: vars(term) for name, term in step.terms.items()},
            "head_products": vars(step.head_products),
            "tokens_per_second": speed,
            "goal": target,
        }
    return report_by_title


def parse_assumed(words: Sequence[str]) -> dict[str, float]:
    """Parse `NAME=NUMBER` of the figures in `Rates` that are one number.

    Raise ValueError for any other name.
    """
    names = {f.name for f in dataclasses.fields(Rates)} - {"attention_ms", "sources"}
    figures = {}
    for word in words:
        name, _, number = word.partition("=")
        if name not in names:
            raise ValueError(
                f"--assume {word}: the name is none of {', '.join(sorted(names))}; use NAME=NUMBER"
            )
        figures[name] = float(number)
    return figures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=RATES, help="default: the device of the results, else h200")
    add(
        "--only",
        type=int,
        nargs="+",
        help="numbers of the goals, starting at 0; the last two are mixtures",
    )
    files: dict[str, Any] = {"type": Path, "nargs": "+", "default": [], "metavar": "FILE"}
    add("--measured", help="use the rates in these results.json files", **files)
    add("--beside", help="compare with the profiles in these results.json files", **files)
    add("--assume", nargs="+", default=[], metavar="NAME=NUMBER", help="replace a rate")
    add("--json")


def main() -> None:
    """Print the forecast of each goal, the rates, and the comparison with profiles."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add_arguments(parser)
    args = parser.parse_args()
    try:
        measured, profiled = read_results(args.measured), read_results(args.beside)
        assumed = parse_assumed(args.assume)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    devices = {}
    for results in (measured, profiled):
        if results["device"]:
            gpu = results["device"]["name"]
            devices[gpu] = device_key(gpu)
    device = args.device or next(filter(None, devices.values()), "h200")
    for gpu, key in devices.items():
        if key != device:
            parser.error(
                f"results of {gpu} do not fit a forecast for --device {device}; use results of the "
                "same device"
            )
    rates = with_measured(RATES[device], measured).with_figures("given with --assume", **assumed)
    all_goals = (*GOALS, *MIXTURES)
    goals = [g for g in all_goals if device in g.tokens_per_second or g in MIXTURES]
    if args.only is not None:
        goals = [all_goals[number] for number in args.only]
    setting = Setting(device, rates)
    report = {"command": sys.argv, "device": device, "rates": dataclasses.asdict(rates)}
    report["goals"] = print_forecasts(goals, setting)
    print_rates(device, rates)
    if args.beside:
        report["beside"] = compare_with_results(profiled, goals, setting)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
