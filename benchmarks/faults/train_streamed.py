"""`tunesmith train` with so many frozen layers that stream from the host, also on a CPU, where all
of them would fit: `benchmarks/faults/kill_and_resume.py --stream` starts it.

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
