# /// script
# requires-python = ">=3.11"
# dependencies = ["huggingface_hub>=1.5"]
# ///
"""Fine-tune a model and push the result to the Hub, as a job of Hugging Face Jobs.

hf jobs uv run --flavor a10g-small --timeout 2h --secrets HF_TOKEN --with 'tunesmith @ git+URL' \\
    scripts/hf_job.py --model Qwen/Qwen3-0.6B --data yahma/alpaca-cleaned --to my-name/my-adapter
uv run --with . scripts/hf_job.py --model MODEL --data rows.jsonl      # the same here, from a clone; pushes nothing

URL is that of a git repository of tunesmith. What follows is passed on to `tunesmith train`: --split,
--format, --columns, key=value. A job's disk is lost when it ends, so --to is checked before the first step,
and a job that is stopped pushes its newest checkpoint.
"""

from __future__ import annotations

import argparse
import sys

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

STOPPED = 75  # exit code of a run that was stopped by a signal and is saved


def main() -> int:
    """Train, then push; returns the exit code of what failed first."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # what is left is for `tunesmith train`
    )
    parser.add_argument("--model", required=True, help="Hub id, folder, or demo")
    parser.add_argument("--data", required=True, help="Hub id of a data set, or a file")
    parser.add_argument("--to", metavar="OWNER/NAME", help="where the result goes on the Hub")
    parser.add_argument("--public", action="store_true", help="make a new repository public")
    parser.add_argument("--output-dir", default="runs/job", help="of the run")
    options, train_words = parser.parse_known_args()
    try:
        from tunesmith.cli.main import main as tunesmith
    except ImportError:
        print(
            "error: tunesmith is not installed here\n"
            "  fix: hf jobs uv run --with 'tunesmith @ git+URL', or in a clone uv run --with .",
            file=sys.stderr,
        )
        return 2
    if options.to:
        try:
            HfApi().create_repo(options.to, private=not options.public, exist_ok=True)
        except (HfHubHTTPError, LocalTokenNotFoundError) as error:
            print(
                f"error: {options.to} cannot be written: {error}\n"
                "  fix: pass a token that may write there: --secrets HF_TOKEN",
                file=sys.stderr,
            )
            return 2
    made = ["--model", options.model, "--data", options.data]
    code = tunesmith(["train", *made, *train_words, f"output_dir={options.output_dir}"])
    if options.to and code in (0, STOPPED):
        public = ["--public"] if options.public else []
        code = tunesmith(["push", options.output_dir, "--to", options.to, *public]) or code
    return code


if __name__ == "__main__":
    sys.exit(main())
