"""What the short product of the health check costs, and how its readings spread:

python benchmarks/speed/health.py --json docs/measurements/health.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from tunesmith.host.chips import Peak
from tunesmith.metrics.hardware import describe_machine
from tunesmith.metrics.health import EVERY, ChipCheck


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--readings", type=int, default=100)
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between two readings")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check = ChipCheck(device, torch.bfloat16, Peak(), every=0.0)
    began = time.perf_counter()
    check.first()
    first = time.perf_counter() - began
    seconds, speeds = [], []
    while len(speeds) < args.readings:
        began = time.perf_counter()
        reading = check.read()
        seconds.append(time.perf_counter() - began)
        if reading is not None:  # on a GPU every other call queues the product
            speeds.append(reading.tflops)
        time.sleep(args.pause)
    middle = statistics.median(speeds)
    found = {
        "device": device.type, "threads": torch.get_num_threads(), "readings": len(speeds),
        "first_seconds": round(first, 4), "median_seconds": round(statistics.median(seconds), 5),
        "worst_seconds": round(max(seconds), 5), "share_of_a_run": statistics.median(seconds) / EVERY,
        "median_tflops": round(middle, 4), "spread": round(statistics.stdev(speeds) / middle, 4),
        "lowest_of_median": round(min(speeds) / middle, 3), "highest_of_median": round(max(speeds) / middle, 3),
        "below_70_percent": sum(speed < 0.7 * max(speeds) for speed in speeds),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if args.json:
        machine = {
            name: describe_machine([])[name] for name in ("cpu", "cpu_cores", "gpus", "torch")
        }
        args.json.write_text(json.dumps({**found, "machine": machine}, indent=1) + "\n")


if __name__ == "__main__":
    main()
