"""One line of JSON about the device that figures are measured on: name, memory, copy bandwidth, one
product, versions.

    python benchmarks/speed/device_facts.py [--output FILE]

The copy counts the bytes that it reads and those that it writes. The product is 8192 x 8192 x 8192
in bf16 on a GPU (1024 on a CPU): what a chip reaches there is the ceiling of every other product.
Numbers are random, since zeros draw less power and run faster.
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

MISSING_PACKAGES = 3  # the exit status if first_gpu_prep.sh has to bring more
NEEDED = ("transformers", "peft", "pyarrow", "jinja2", "psutil", "regex", "rich")
NEEDED += ("ruamel.yaml", "pydantic", "datasketch")
COPY_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}  # many times the cache


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s of a copy within the device's memory, read and written bytes together."""
    source = torch.randint(0, 255, (COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source))


def device_facts() -> dict[str, Any]:
    """What the line holds; `versions` are the driver's, CUDA's and those of the packages."""
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
    """Print the line; --output writes it to a file too."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    # The module without its parent: to look for `ruamel.yaml` would import `ruamel`.
    missing = [name for name in NEEDED if importlib.util.find_spec(name.partition(".")[0]) is None]
    if missing:
        print(f"missing here: {' '.join(missing)}; name them in PACKAGES of first_gpu_prep.sh")
        sys.exit(MISSING_PACKAGES)
    line = json.dumps(device_facts())
    print(line)
    if options.output:
        options.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
