"""`tunesmith train` with a given number of frozen layers that are streamed from the host.

The layers are streamed even if all would fit, and also on a CPU.
`benchmarks/faults/kill_and_resume.py --stream` starts this program.

    python benchmarks/faults/train_streamed.py LAYERS RECIPE [key=value ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from tunesmith.cli.main import main

sys.path.insert(0, str(Path(__file__).parents[1] / "speed"))
from streamed import with_streamed

if __name__ == "__main__":
    _, layers, *words = sys.argv
    sys.argv = ["tunesmith", "train", *words]
    with with_streamed(int(layers)):
        sys.exit(main())
