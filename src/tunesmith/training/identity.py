"""The files with which a run directory begins: env.json, config.yaml and held-out.txt."""

import json
from pathlib import Path

import torch

from tunesmith.config.dump import digest, dump
from tunesmith.config.trust import mark_own_run
from tunesmith.host.files import write_atomically
from tunesmith.metrics import hardware
from tunesmith.presentation.data import contract_lines
from tunesmith.run_dir import HELD_OUT, IDENTITY, RECIPE
from tunesmith.training.session import Session

# Maximum number of rows whose first words are in held-out.txt. The number is limited, because each
# of these rows must be read from its data file.
QUOTED_ROWS = 1000


def write_identity(session: Session, argv: list[str] | None) -> None:
    """Write env.json, config.yaml and held-out.txt, the list of held-out rows, into the run
    directory.

    env.json marks the folder as a run directory, and describes the machine, the data and the
    choices of the plan.
    """
    recipe = session.recipe
    out = Path(recipe.output_dir)
    data = session.data
    plan = session.plan
    choices = {
        part: {"taken": choice, "why": plan.why[part]} for part, choice in plan.choices.items()
    }
    # Store the number of threads that torch uses now. If the plan has a reason for this number,
    # store it too.
    why = plan.why.get("threads", "only the host's part runs on the CPU")
    choices["threads"] = {"taken": str(torch.get_num_threads()), "why": why}
    env = {
        **hardware.describe_machine(argv),
        "recipe_hash": digest(recipe),
        **session.hashes,
        "validation_examples": len(data.validation) if data.validation is not None else 0,
        "template": data.template.name,
        "mfu_peak": session.peak._asdict(),
        "choices": choices,
        "checks": contract_lines(data.contracts),
    }
    if session.ranks.world > 1:
        env |= {"mesh": session.mesh.shape._asdict(), "hosts": session.ranks.hosts}
    write_atomically(out / IDENTITY, json.dumps(env, indent=1))
    write_atomically(out / RECIPE, dump(recipe))
    mark_own_run(out / RECIPE)
    held_out = data.validation
    if recipe.data.hold_out and held_out is not None:
        lines: dict[str, str] = {}
        for i in range(len(held_out)):
            place = held_out.where(i)
            # A long document is split into several examples, but its row is listed only once.
            if place not in lines:
                beginning = held_out.beginning(i) if len(lines) < QUOTED_ROWS else ""
                lines[place] = f"{place}  {beginning}".rstrip() + "\n"
        write_atomically(out / HELD_OUT, "".join(lines.values()))
