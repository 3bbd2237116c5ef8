# /// script
# requires-python = ">=3.11"
# dependencies = ["huggingface_hub>=1.5"]
# ///
"""Fine-tune a model in a job of Hugging Face Jobs, and upload the result to the Hub.

hf jobs uv run --flavor a10g-small --timeout 2h --secrets HF_TOKEN \\
    --with 'tunesmith @ git+URL' scripts/hf_job.py \\
    --model Qwen/Qwen3-0.6B --data yahma/alpaca-cleaned --to my-name/my-adapter
uv run --with . scripts/hf_job.py --model MODEL --data rows.jsonl   # on this machine, in a clone

URL is the address of a git repository of tunesmith. Arguments that are not listed below, such as
--split, --format, --columns and key=value, are passed to `tunesmith train`. Without --to, nothing
is uploaded. A job's disk is deleted when the job ends. Therefore write access to --to is checked
before the training, and a job that is stopped uploads its newest checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

STOPPED = 75  # exit code of a run that saved and stopped after a signal


def main() -> int:
    """Train and upload the result. Return the exit code of `train`."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # other arguments belong to `tunesmith train`
    )
    parser.add_argument("--model", required=True, help="model: a Hub id, a folder, or demo")
    parser.add_argument("--data", required=True, help="data set: a Hub id or a file")
    parser.add_argument("--to", metavar="OWNER/NAME", help="repository on the Hub to upload to")
    parser.add_argument(
        "--public", action="store_true", help="make the repository public if it is new"
    )
    parser.add_argument("--output-dir", default="runs/job", help="run directory")
    options, train_words = parser.parse_known_args()
    try:
        from tunesmith.cli.main import main as tunesmith
    except ImportError:
        print(
            "error: tunesmith is not installed in this environment\n"
            "  fix: hf jobs uv run --with 'tunesmith @ git+URL' ..., or in a clone: "
            "uv run --with . ...",
            file=sys.stderr,
        )
        return 2
    if options.to:
        try:
            HfApi().create_repo(options.to, private=not options.public, exist_ok=True)
        except (HfHubHTTPError, LocalTokenNotFoundError) as error:
            print(
                f"error: cannot create or find the repository {options.to} on the Hub: {error}\n"
                "  fix: pass a token with write permission: hf jobs uv run --secrets HF_TOKEN ...",
                file=sys.stderr,
            )
            return 2
    made = ["--model", options.model, "--data", options.data]
    code = tunesmith(["train", *made, *train_words, f"output_dir={options.output_dir}"])
    if options.to and code in (0, STOPPED):
        HfApi().upload_folder(
            repo_id=options.to,
            folder_path=newest_weights(Path(options.output_dir)),
            # Only a resumed run needs the optimizer state.
            ignore_patterns=["state/*", "manifest.json"],
        )
    return code


def newest_weights(run_dir: Path) -> Path:
    """Return the folder final/, or the newest checkpoint of a run that was stopped."""
    final = run_dir / "final"
    checkpoints = run_dir.glob("checkpoint-*")
    by_step = sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]))
    return final if final.is_dir() else by_step[-1]


if __name__ == "__main__":
    sys.exit(main())
