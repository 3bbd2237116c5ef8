"""Faults that users and real hardware have found, put back into the source one at a time: which
test notices each of them.

    python benchmarks/faults/injected.py --json injected.json
    python benchmarks/faults/injected.py --only saved_map olora

Each fault replaces a text in a copy of the repository. Then the tests named beside it run, the quick
lane first, until one fails. The output is a Markdown table: the fault, the lane, and the first test
that fails. A fault that no test notices is "not noticed", and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from mutants import ROOT, copy_repository

LANES = {"quick": "not slow and not nightly", "test": "slow and not nightly", "nightly": "nightly"}


class Fault(NamedTuple):
    """A fault of the past.

    Attributes:
        name, what: a short name, and what a user saw.
        file: file below src/tunesmith.
        right, wrong: a text of the file, and the text that replaces it.
        tests: arguments of pytest.
    """

    name: str
    what: str
    file: str
    right: str
    wrong: str
    tests: str


# Found by trying public bug reports, configurations and data sets.
DATA = "tests/data"
FOUND_BY_USERS = [
    Fault("fb_alpaca_null", "one bad row in six: the other columns are trained on instead", "rows/detect.py",
          "if not reads_all and not skips_bad_rows:", "if False:", DATA),
    Fault("fb_text_col", "a row of an empty chat: another column is trained on", "rows/detect.py",
          "readable = _most_specific([trial for trial in trials if trial.read])",
          "readable = _most_specific([t for t in trials if t.read == sample.keys()])[:1]", DATA),
    Fault("kto_csv", "rows with labels: all answers, good and bad, are learned", "rows/columns.py",
          'for format_name in ("preference", "feedback"):', 'for format_name in ("preference",):', DATA),
    Fault("is_correct", "a column is_correct is ignored: bad answers are learned", "rows/labels.py",
          "return label is False or value_of_cell(value) == -1", "return False", DATA),
    Fault("reward01", "a reward of 0 and 1 is ignored: bad answers are learned", "rows/labels.py",
          "if max(rows_by_grade) == 1 and low < 1:", "if False:", DATA),
    Fault("scores_swapped", "the rejected answer has the higher score: no warning", "rows/labels.py",
          "is_other = is_other or chosen <= rejected", "is_other = is_other or chosen < chosen", DATA),
    Fault("flags", "a mark of an untrained turn is ignored", "rows/row_masks.py",
          "return all(marks.values())", "return True", DATA),
    Fault("anthropic_sys", "the column system beside messages is dropped", "rows/messages.py",
          '''    if first["role"] != "system":
        return [{"role": "system", "content": system}, *messages]''',
          '''    if first["role"] != "system":
        return messages''', DATA),
    Fault("think_gptoss", "a thought under another key is dropped", "rows/messages.py",
          'THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")',
          'THOUGHTS = ("reasoning_content", "reasoning")', DATA),
    Fault("args_str", "arguments as JSON text are written twice encoded", "rows/messages.py",
          'arguments = row.json(function[names[0]], f"{at} arguments") if names else None',
          'arguments = {"text": function[names[0]]} if names else None', DATA),
    Fault("string_args", "a template that reads arguments as text gets an object", "tokens/text/thoughts.py",
          "if calls and self.text_arguments:", "if False:", DATA),
    Fault("strip_think", "a template drops the thought: no warning", "tokens/text/thoughts.py",
          'if (message.get("reasoning_content") or "").strip() not in supervised:', "if False:", DATA),
    Fault("think_inline", "a thought in the text of an answer is not found", "tokens/text/thoughts.py",
          "if text.startswith(opening, start):", "if False:", DATA),
    Fault("fc_empty", "OpenAI's old function_call is ignored", "rows/messages.py",
          'elif key in ("tool_calls", "function_call"):', 'elif key == "tool_calls":', DATA),
    Fault("parallel_results", "results of parallel calls are in another order than the calls", "rows/messages.py",
          'turns.sort(key=lambda turn: places[turn["tool_call_id"]])', "pass", DATA),
    Fault("saved_map", "cache-*.arrow of datasets is read: each row twice", "rows/source/listings.py",
          'return [*listed, *(name for name in names if not name.endswith(".arrow"))]', "return names", DATA),
    Fault("img_tag", "the text <image> without a picture: the model looks for one", "tokens/text/pictures_in_text.py",
          "if found := any_of(processor.tokens).search(text):", "if found := None:", DATA),
    Fault("raw_label", "the first token of an answer is merged with the prompt and not learned", "tokens/text/align.py",
          "if is_crossed or self._has_other_whitespace_tokens(text, edge, tokens, first):", "if False:", DATA),
    Fault("olora", "an adapter that changes the base is read as a plain one", "adapter/peft_files.py",
          "v in (None, True, False, \"gaussian\", \"orthogonal\", \"eva\", \"mica\")", "True", "tests/adapter"),
    Fault("added_tokens", "an adapter with more rows in its embedding is read in part", "adapter/peft_files.py",
          "if shape == own_shape or not shape or shape[1:] != own_shape[1:]:", "if True:", "tests/adapter"),
    Fault("axolotl_underscore", "16_384 is a text", "tools/importers/source_config.py",
          'number = scalar(text.replace("_", ""))', "return scalar(text)", "tests/tools/importers"),
]  # fmt: skip
# Found on GPUs, or by an audit of what a GPU would hit.
FOUND_ON_HARDWARE = [
    Fault("fp8_one_sign", "the check of fp8 multiplies numbers of one sign: every Hopper is refused", "formats/fp8.py",
          "return (sizes * (2 * signs - 1)).to(torch.bfloat16)", "return sizes.to(torch.bfloat16)", "tests/quant"),
    Fault("fp8_scales", "the check of fp8 accepts a wrong product", "formats/fp8.py",
          "if not (forward <= MAX_RELATIVE_ERROR and backward <= MAX_RELATIVE_ERROR):", "if False:", "tests/quant"),
    Fault("post_expert_norm", "a flag that the lowest Transformers does not set: mixtures fail", "model/layers/experts.py",
          "has_post_expert_norm: bool = False  # Transformers 5.17 does not set this flag",
          "has_post_expert_norm: bool", "tests/quant tests/model tests/parallel"),
    Fault("projector_order", "ranks start sums of gradients in different orders", "training/trainer.py",
          "late={p for module in session.model.projector for p in module.parameters()},",
          "late=frozenset(),", "tests/parallel tests/training"),
    Fault("gqa_mask", "grouped heads with a mask fall back to fp32 products", "model/layers/attention.py",
          "takes_groups = mask is None and q.shape[-1] == v.shape[-1] <= MAX_GROUPED_WIDTH", "takes_groups = True",
          "tests/model"),
    Fault("cudnn_plans", "cuDNN builds a plan for each new shape", "runtime/host.py",
          'os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")', "pass", "tests/runtime tests/host"),
    Fault("no_pixel_worker", "bound cores give no process for pictures beside a GPU", "batches/pixels.py",
          "min_workers = 1 if torch.cuda.is_available() else 0", "min_workers = 0", DATA),
    Fault("unmeasured_kernel", "a kernel is used on GPUs on which it was not measured", "formats/nf4.py",
          "return codes.is_cuda and torch.cuda.get_device_capability(codes.device) == (9, 0)",
          "return codes.is_cuda", "tests/quant tests/runtime"),
    Fault("unmeasured_attention", "our attention is used with heads that were not measured", "model/layers/packed_attention.py",
          "if dtype != torch.bfloat16 or head_dim != MEASURED_HEAD_DIM or group not in MEASURED_GROUPS:",
          "if dtype != torch.bfloat16:", "tests/model"),
    Fault("page_lock", "a page lock that fails in part is not undone", "runtime/stream.py",
          "page_unlock(locked[count:], self.device)", "pass", "tests/runtime"),
    Fault("tower_waits", "the vision part waits for the device in every layer", "model/layers/vision.py",
          "edges = cu_seq_lens_q.cpu().long()", "edges = cu_seq_lens_q.long()", "tests/model tests/training"),
]  # fmt: skip


def first_failure(tree: Path, tests: str, lane: str) -> str:
    """Return the first test of a lane that fails, or ""."""
    env = os.environ | {
        "PYTHONPATH": str(tree / "src"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "-m", LANES[lane], *tests.split()],
        check=False,
        env=env,
        cwd=tree,
        capture_output=True,
        text=True,
    )
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    return failed[1] if failed else ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="names of faults; all if left out")
    parser.add_argument("--lanes", nargs="*", choices=LANES, default=["quick", "test"])
    parser.add_argument("--check", action="store_true", help="only check that the texts exist")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    faults = [
        fault
        for fault in FOUND_BY_USERS + FOUND_ON_HARDWARE
        if not arguments.only or fault.name in arguments.only
    ]
    for fault in faults:
        count = (ROOT / "src" / "tunesmith" / fault.file).read_text().count(fault.right)
        if count != 1:
            sys.exit(f"{fault.name}: {fault.file} has its text {count} times, not once")
    if arguments.check:
        return 0
    results = []
    print("| fault | what a user saw | lane | test |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="injected-") as place:
        tree = Path(place, "tree")
        copy_repository(tree)
        for fault in faults:
            file = tree / "src" / "tunesmith" / fault.file
            text = file.read_text()
            file.write_text(text.replace(fault.right, fault.wrong))
            noticed, by = "not noticed", ""
            for lane in arguments.lanes:
                by = first_failure(tree, fault.tests, lane)
                if by:
                    noticed = lane
                    break
            file.write_text(text)
            results.append({"fault": fault.name, "what": fault.what, "lane": noticed, "test": by})
            print(f"| {fault.name} | {fault.what} | {noticed} | {by} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(any(result["lane"] == "not noticed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
