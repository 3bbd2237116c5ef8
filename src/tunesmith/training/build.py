"""All stages of a start, from the recipe to the Session. torch is imported after the inputs are
checked.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from tunesmith.checkpoint.resume import Start
from tunesmith.config.schema import Run
from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.host.signals import loading_libraries
from tunesmith.hub.model_files import Weights
from tunesmith.presentation.data import resume_lines, start_data_lines
from tunesmith.stages.inputs import read_inputs
from tunesmith.stages.tokens import TokenFacts

if TYPE_CHECKING:
    from tunesmith.parallel.mesh import Mesh
    from tunesmith.parallel.mesh_shape import MeshShape
    from tunesmith.training.session import Session

log = logging.getLogger(__name__)


def build(
    run: Run,
    start: Start,
    *,
    weights: Weights = "stored",
    measured: bool = False,
    ranks: Ranks = ONE_PROCESS,
    make_mesh: "Callable[[MeshShape, str], Mesh] | None" = None,
) -> "Session":
    """Read the inputs of a recipe and build a Session. The arguments are those of
    `build_from_tokens`.
    """
    tokens = read_inputs(run, start, ranks, weights=weights, measured=measured)
    return build_from_tokens(tokens, ranks, weights=weights, measured=measured, make_mesh=make_mesh)


def build_from_tokens(
    tokens: TokenFacts,
    ranks: Ranks = ONE_PROCESS,
    *,
    why: bool = False,
    weights: Weights = "stored",
    measured: bool = False,
    make_mesh: "Callable[[MeshShape, str], Mesh] | None" = None,
) -> "Session":
    """Build a Session. Each input is checked before slower work begins.

    Args:
        ranks: the ranks of the run. All of them call this function at the same time.
        why: whether to log the reason of each choice.
        weights: "random" creates random weights on the device. The folder `model.name` then needs
            no weights.
        measured: whether the session is only used to measure the speed of training. If True, no
            disk space for checkpoints is required, and rows are repeated so that all steps are
            full.
        make_mesh: function that creates the mesh of the ranks.
    """
    _log_lines(start_data_lines(tokens.data, why=why))
    _log_lines(resume_lines(tokens.resumed, tokens.fitted_run.train))
    if measured:
        # Repeat the rows, because all steps of a measurement must be full.
        steps = tokens.data.schedule.steps(tokens.fitted_run.train.duration) or 0
        tokens = replace(tokens, data=tokens.data.repeated(steps))
    with loading_libraries():
        from tunesmith.parallel.mesh import Mesh
        from tunesmith.presentation.start import machine_lines, planned_lines, session_lines
        from tunesmith.stages.plan import find_machine, make_plan
        from tunesmith.training.session import open_session
    machine = find_machine(tokens, ranks)
    _log_lines(machine_lines(machine))
    planned = make_plan(machine, ranks, weights=weights, measured=measured)
    _log_lines(planned_lines(planned))
    session = open_session(planned, ranks, make_mesh or Mesh.of)
    model = session.model.model
    _log_lines(session_lines(planned, model, session.plan, session.peak, why=why))
    return session


def _log_lines(lines: Iterable[str]) -> None:
    for line in lines:
        log.info(line)
