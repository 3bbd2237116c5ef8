"""Output of the command `plan`, as text or JSON."""

import argparse
import json
import logging
import sys
from typing import TYPE_CHECKING

from tunesmith.config.schema import Run
from tunesmith.host.streams import show
from tunesmith.model.known.gguf_writers import describe_gguf_export, gguf_writer
from tunesmith.planning.forecast import Forecast, Planner
from tunesmith.planning.machines import Cluster
from tunesmith.planning.resolve import checkpoint_bytes, resolve_dtype
from tunesmith.planning.savings import check_memory_fits
from tunesmith.presentation.plan import plan_lines, source_text, warning_text
from tunesmith.tools.plan.on_paper import PaperModel, StatedRows, prepare_on_paper

if TYPE_CHECKING:
    # Import only for type checks: Transformers is slow to import, and a plan may not need it.
    from tunesmith.start.make_recipe import NewRecipe


log = logging.getLogger(__name__)


def show_plan(
    args: argparse.Namespace, cluster: Cluster, recipe: Run, new_recipe: "NewRecipe | None"
) -> None:
    """Print the plan of a recipe. Raise MachineError if the run does not fit.

    Args:
        args: the options of the command `plan`.
        cluster: the machines of the plan.
        new_recipe: how the recipe was created from a model and data. None if it was read from a
            file.
    """
    rows = StatedRows(args.rows, args.length)
    known = None
    if new_recipe is not None:
        known = new_recipe.facts
        if not args.length:
            rows = StatedRows(args.rows, new_recipe.mean_length, known is None)
    planner, model = prepare_on_paper(recipe, cluster, rows, known)
    _, reason = resolve_dtype(recipe.model, recipe.train, cluster.chip, planner.spec)
    if reason:
        log.info(f"model.dtype: {planner.run.model.dtype}, {reason}")
    best = planner.best()
    if args.json:
        print(json.dumps(_report(planner, best, model), indent=1, default=vars))
    else:
        show("\n".join(plan_lines(planner, best, model.folder, model.types)), sys.stdout)
    # This call raises the error if the run does not fit. It is after the output, so that the user
    # also sees the inputs of the plan.
    check_memory_fits(planner.run, best.plan, planner.machine, where=cluster.describe())


def _report(planner: Planner, best: Forecast, model: PaperModel) -> dict[str, object]:
    """Return the values that --json prints."""
    plan = vars(best.plan) | {
        "warnings": [warning_text(best.plan, warning) for warning in best.plan.warnings],
        "mesh": best.plan.mesh._asdict(),
    }
    size, _ = checkpoint_bytes(planner.run, planner.trained, model.folder)
    return {
        "machines": vars(planner.cluster),
        "work": planner.work._asdict() | {"source": source_text(planner.run, planner.work)},
        "checkpoint_bytes": size,
        "gguf": {
            "writer": gguf_writer(*model.types),
            "needs": describe_gguf_export(*model.types),
        },
        # List with one entry, the mesh that `train` would use.
        "meshes": [vars(best) | {"plan": plan}],
    }
