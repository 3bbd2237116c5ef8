"""`tunesmith train` with so many frozen layers that stream from the host, also on a CPU, where all
of them would fit: `benchmarks/faults/kill_and_resume.py --stream` starts it.

    python benchmarks/faults/train_streamed.py LAYERS RECIPE [key=value ...]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from tunesmith.cli.main import main
from tunesmith.training import build

plan_model = build.plan_model


def planned(*args: Any) -> Any:
    model, plan = plan_model(*args)
    return model, replace(plan, streamed_layers=int(LAYERS))


if __name__ == "__main__":
    _, LAYERS, *words = sys.argv
    sys.argv = ["tunesmith", "train", *words]
    build.plan_model = planned
    sys.exit(main())
