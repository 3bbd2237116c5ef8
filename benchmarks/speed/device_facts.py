"""Facts about a device as one line of JSON: name, memory, copy bandwidth, matmul speed, versions.

    python benchmarks/speed/device_facts.py [--output FILE]

The copy bandwidth counts both the bytes read and the bytes written. The matmul has the size
8192 x 8192 x 8192 on a GPU and 1024 x 1024 x 1024 on a CPU, in bf16. Its speed is the maximum that
other matmuls can reach. The factors are random numbers, because zeros draw less power and run
faster.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

from tunesmith.metrics.hardware import describe_machine, matmul_tflops, seconds_of

MISSING_PACKAGES = 3  # exit status if first_gpu_prep.sh must install more packages
NEEDED = ("transformers", "peft", "pyarrow", "jinja2", "psutil", "regex", "rich")
NEEDED += ("ruamel.yaml", "pydantic", "datasketch")
COPY_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}  # many times the size of the caches


def copy_bandwidth(device: torch.device) -> float:
    """Measure the bytes per second that a copy in the device's memory reads and writes together."""
    source = torch.randint(0, 255, (COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source))


def device_facts() -> dict[str, Any]:
    """Return the facts. `versions` has the versions of the driver, CUDA and the packages."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe_machine()
    gpus = machine.pop("gpus")
    name, memory_gib = "cpu", machine["memory_gib"]
    if gpus:
        name, memory_gib = gpus[0]["name"], gpus[0]["memory_gib"]
    return {
        "name": name,
        "memory_gib": memory_gib,
        "copy_tb_per_s": round(copy_bandwidth(device) / 1e12, 4),
        "product_tflops": round(matmul_tflops(device, torch.bfloat16), 3),
        "versions": machine,
    }


def main() -> None:
    """Print the line. With --output, also write it to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    # Only look for the parent package, because `find_spec("ruamel.yaml")` would import `ruamel`.
    missing = [name for name in NEEDED if importlib.util.find_spec(name.partition(".")[0]) is None]
    if missing:
        print(
            f"missing packages: {' '.join(missing)}; add them to PACKAGES and run "
            "benchmarks/first_gpu_prep.sh again"
        )
        sys.exit(MISSING_PACKAGES)
    line = json.dumps(device_facts())
    print(line)
    if options.output:
        options.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
