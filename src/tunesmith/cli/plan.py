"""Forecast what a recipe takes on machines that need not be here: memory, time, cost, and how ranks share the work.

Only the model's config.json is needed, and not even that for the models of recipes that ship: no network, token or
license. Lengths are those of the token cache if it has the recipe's rows (`tunesmith data` puts them there). No GPU is
touched. The exit code is 2 where nothing fits.

examples:
  tunesmith plan llama3.3-70b-full train.duration='500 steps' --on 2x8xh100 --price 2.5    # USD for a GPU and hour
  tunesmith plan my-recipe.yaml parallel.tensor=8 --on 8xh100 --json
  tunesmith plan llama3.1-8b-lora --on 2x-dgx-spark --length 180     # tokens of an example, where they are not known
  tunesmith plan my-recipe.yaml                                      # on this machine
"""

import argparse
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.cli.options import whole_number
from tunesmith.errors import EXIT_OK, TunesmithError

if TYPE_CHECKING:
    from tunesmith.config.schema import Model, Run
    from tunesmith.data.tokens import TokenSet
    from tunesmith.planning.forecast import Forecast, Planner

GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a recipe file, or the name of one that ships"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe keys that win over the file's"
    )
    machines = "2x8xh100, 4xa100-80gb, h200, 2x-dgx-spark, ...; here (default): this machine"
    parser.add_argument("--on", default="here", metavar="MACHINES", help=machines)
    figures = "a figure of the GPUs: gib, tflops (of whole steps in bf16), bandwidth, link, network (GB/s)"
    parser.add_argument(
        "--assume", action="append", default=[], metavar="NAME=NUMBER", help=figures
    )
    parser.add_argument(
        "--length",
        type=whole_number,
        metavar="TOKENS",
        help="of an example, if no tokens are there",
    )
    parser.add_argument("--price", type=_price, metavar="USD", help="of a GPU for an hour")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    from tunesmith.config.load import load_recipe
    from tunesmith.model.spec import check_seq_len, read_spec
    from tunesmith.planning.forecast import measure_work, plan_on_paper
    from tunesmith.planning.machines import read_cluster
    from tunesmith.planning.resolve import checkpoint_bytes
    from tunesmith.planning.savings import refuse_overrun

    cluster, recipe = read_cluster(args.on, args.assume), load_recipe(args.recipe, args.overrides)
    config, where, folder = _config(recipe.model)
    spec = read_spec(config, where=where, trust_remote_code=recipe.model.trust_remote_code)
    check_seq_len(spec, recipe.data.seq_len, where=where)
    tokens = None if args.length or folder is None else _cached(recipe, folder)
    work = measure_work(recipe, spec, tokens, args.length)
    planner = plan_on_paper(recipe, spec, cluster, work)
    found = planner.ranked()
    if args.json:
        rows = [
            {**vars(f), "plan": {**vars(f.plan), "mesh": f.plan.mesh._asdict(), "savings": None}}
            for f in found
        ]
        size, _ = checkpoint_bytes(recipe, planner.trained)
        about = {"machines": vars(cluster), "work": work._asdict(), "checkpoint_bytes": size}
        if args.price:
            about["cost_usd"] = _cost(planner, found[0], args.price)
        print(json.dumps({**about, "meshes": rows}, indent=1, default=vars))
    else:
        print(*_lines(planner, found, args.price), sep="\n")
    if not found[0].fits:
        larger = planner.enough_nodes()
        more = f"; or {larger.nodes} nodes: {larger.describe()}" if larger else ""
        refuse_overrun(found[0].plan, planner.machine, where=cluster.describe(), more=more)
    return EXIT_OK


def _config(model: "Model") -> "tuple[Mapping[str, Any], str, Path | None]":
    """What a model's config.json says, where that is from, and the folder with it and the tokenizer, if there is one.

    The shapes of models of recipes that ship are here: they take no network, no token and no license.
    """
    from tunesmith.hub import fetch
    from tunesmith.model.safetensors_files import read_json
    from tunesmith.model.shapes import config_of_model

    path = fetch.local_model(model)
    in_package = config_of_model(model.name) if path is None and model.revision is None else None
    if in_package is not None and fetch.cached_without_weights(model.name) is None:
        return in_package, model.name, None
    is_gguf = path is not None and path.is_file()
    folder = (
        fetch.fetch(model) if is_gguf else fetch.fetch_without_weights(model.name, model.revision)
    )
    file = folder / "config.json"
    return read_json(file), str(file), folder


def _cached(recipe: "Run", folder: Path) -> "TokenSet | None":
    """The tokens of a recipe, if the token cache has them; no rows are downloaded."""
    from tunesmith.data.source import is_local
    from tunesmith.host.files import cache_folder
    from tunesmith.hub import fetch

    cache, names = cache_folder("tokens"), [source.source for source in recipe.data.train]
    if not (
        cache.exists()
        and all(is_local(n) or fetch.repo_cache(n, "dataset").exists() for n in names)
    ):
        return None
    from tunesmith.data.splits import read_splits
    from tunesmith.data.template import select_template
    from tunesmith.data.tokens import tokenize
    from tunesmith.model.tokenizer import eos_ids, load_tokenizer

    with suppress(TunesmithError, LookupError):
        tokenizer = load_tokenizer(fetch.tokenizer_folder(recipe.model, folder), recipe.model)
        template = select_template(recipe.data, tokenizer, eos_ids(folder, tokenizer))
        rows, _ = read_splits(recipe.data, recipe.train.seed)
        return tokenize(
            rows, recipe.data, template, tokenizer, cache=cache, what="train", only_cached=True
        )
    return None


def _price(text: str) -> float:
    """A finite number above 0."""
    with suppress(ValueError):
        price = float(text)
        if 0 < price < math.inf:
            return price
    raise argparse.ArgumentTypeError(f"{text} is not a number above 0")


def _cost(planner: "Planner", forecast: "Forecast", price: float) -> float | None:
    """USD of the whole run; None where its hours are not known."""
    return forecast.hours * price * planner.cluster.world if forecast.hours else None


def _lines(planner: "Planner", found: "list[Forecast]", price: float | None) -> list[str]:
    """A table of the meshes, and what the first of them does."""
    from tunesmith.planning.forecast import BETTER
    from tunesmith.planning.resolve import checkpoint_bytes
    from tunesmith.quant.schemes import scheme_of

    chip, work, best = planner.cluster.chip, planner.work, found[0]
    size, copies = checkpoint_bytes(planner.run, planner.trained)
    speed = (
        f"{chip.tflops:.0f} TFLOP/s in whole steps"
        if chip.tflops
        else "for times --assume tflops=NUMBER"
    )
    lines = [
        f"{planner.cluster.describe()}: {chip.gib:.0f} GiB, {speed} ({chip.source})",
        f"examples: {work.source}; {work.step.mean:,.0f} tokens a step, {work.steps or 'an unknown number of'} steps",
        "replicate x shard x tensor     micro batch  recompute      GiB   step s  tokens/s   idle",
    ]
    for f in found:
        memory = f"{f.plan.recomputed_layers:4} of {f.plan.layers:<3} {f.phases['step'] / GIB:8.1f}"
        known = f.step_seconds and f.tokens_per_second
        speed = (
            f"{f.step_seconds:8.2f} {f.tokens_per_second:9,.0f}" if known else f"{'-':>8} {'-':>9}"
        )
        shape = f"{' x '.join(map(str, f.plan.mesh)):<26} {f.plan.choices['micro batch']:>15}"
        lines.append(
            f"{shape} {memory} {f'{speed} {f.idle_share:6.0%}' if f.fits else ' does not fit'}"
        )
    if scheme_of(planner.run.model).has_fp8_matmuls and best.plan.base != "fp8":
        what = f"the base stays in {best.plan.base}: {best.plan.why['base']}"
        lines.append(f"warning: {what}; to save memory: model.quantize=nf4")
    if not best.fits:
        return lines
    seconds = ", ".join(
        f"{part} {value:.2f}" for part, value in best.seconds.items() if value >= 0.005
    )
    phases = ", ".join(f"{needed / GIB:.1f} to {phase}" for phase, needed in best.phases.items())
    sent = [
        f"{amount / 1e9:,.2f} GB over its {name}" for name, amount in best.sent.items() if amount
    ]
    hidden = (
        f"; communication hidden behind them {best.hidden_seconds:.2f}"
        if best.hidden_seconds
        else ""
    )
    if any(f.fits and (f.step_seconds or 0) < (best.step_seconds or 0) for f in found):
        lines.append(
            f"first is not the fastest: more cuts or shards, or groups over nodes, must gain {1 - BETTER:.0%}"
        )
    lines += [
        f"memory of a rank: {best.plan.memory.describe()}; it takes {phases}, of {best.room / GIB:.1f} GiB",
        *([f"seconds of a step: {seconds}{hidden}"] if best.step_seconds else []),
        *([f"a rank sends in a step: {', '.join(sent)}"] if sent else []),
        f"disk: {size / 1e9:.1f} GB a checkpoint, at most {copies} at once",
    ]
    if best.hides_from:
        lines.append(
            f"shards: gathers hide in micro batches of {best.hides_from:,} tokens, and hold up smaller ones"
        )
    if warning := planner.warn_of_exposed_gathers(best):
        lines.append(warning)
    what = "hours and price" if price else "hours"
    if best.hours:
        cost = f", {_cost(planner, best, price):,.0f} USD" if price else ""
        lines.append(f"the run: {best.hours:,.2f} h{cost}, without validation and checkpoints")
    elif best.step_seconds:
        lines.append(
            f"{what}: not known, as no tokens are cached; train.duration='500 steps' gives them"
        )
    elif price:
        lines.append(
            f"{what}: not known, as the speed of this machine is not; --assume tflops=100 gives them"
        )
    if (other := planner.with_tensor()) and (other.step_seconds or 0) < BETTER * (
        best.step_seconds or 0
    ):
        shape = other.plan.mesh.describe()
        lines.append(f"parallel.tensor=auto is faster: {shape}, {other.step_seconds:.2f} s a step")
    if planner.cluster.world > 1:
        lines.append(
            f"`train` takes the first on these machines; to have it elsewhere: {best.keys}"
        )
    return lines
