"""All stages of a start, from the recipe to the Session. torch is imported after the inputs are
checked.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.host.logger import log_lines
from tunesmith.host.signals import loading_libraries
from tunesmith.presentation.data import resume_lines, start_data_lines
from tunesmith.start.inputs import read_inputs
from tunesmith.start.request import Request
from tunesmith.start.tokens import TokenFacts

if TYPE_CHECKING:
    from tunesmith.training.session import Session


def build(request: Request, ranks: Ranks = ONE_PROCESS) -> "Session":
    """Read the inputs of a recipe and build a Session. See `build_from_tokens`."""
    return build_from_tokens(read_inputs(request, ranks), ranks)


def build_from_tokens(
    tokens: TokenFacts,
    ranks: Ranks = ONE_PROCESS,
    *,
    why: bool = False,
) -> "Session":
    """Build a Session. Each input is checked before slower work begins. This is a collective call.

    Args:
        why: whether to log the reason of each choice.
    """
    log_lines(start_data_lines(tokens.data, why=why))
    log_lines(resume_lines(tokens.resumed, tokens.run.train))
    if tokens.model.rows.request.purpose == "measure":
        # Repeat the rows, because all steps of a measurement must be full.
        steps = tokens.data.schedule.steps(tokens.run.train.duration) or 0
        tokens = replace(tokens, data=tokens.data.repeated(steps))
    with loading_libraries():
        from tunesmith.start.lines import machine_lines, planned_lines, session_lines
        from tunesmith.start.plan import find_machine, make_plan
        from tunesmith.start.session import open_session
    machine = find_machine(tokens, ranks)
    log_lines(machine_lines(machine))
    planned = make_plan(machine, ranks)
    log_lines(planned_lines(planned))
    session = open_session(planned, ranks)
    model = session.model.model
    log_lines(session_lines(planned, model, session.plan, session.peak, why=why))
    return session
