"""Submit a batch script that trains a recipe on a Slurm cluster.

example:
  tunesmith launch slurm my-recipe.yaml --nodes 2 --gpus-per-node 8 \\
    --time 12:00:00
  tunesmith launch slurm my-recipe.yaml --partition gpu --account my-project \\
    --gpus-per-node 4 --setup 'module load cuda'
  tunesmith launch slurm --model Qwen/Qwen3-8B --data faq.csv --gpus-per-node 1
  tunesmith launch slurm my-recipe.yaml --gpus-per-node 8 --render  # print only
  tunesmith logs -f runs/my-run
  tunesmith stop runs/my-run  # saves; the same launch resumes

Before the time limit the run saves, and the job is requeued and resumes, at
most --max-requeues times. Tokens are not sent: fetch the model first
(`tunesmith fetch`), and log in to trackers on the login node. See
docs/slurm.md.
"""

import argparse
import dataclasses

from tunesmith.cli.options import notify, whole_number
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.launch.jobs import check_free, recipe_file
from tunesmith.tools.launch import slurm
from tunesmith.tools.launch.cli_local import add_launched, is_finished, launched_recipe

# Keys of a request that are an option each -> its help.
SETTINGS = {
    "partition": "",
    "account": "",
    "qos": "",
    "constraint": "such as h100",
    "time": "limit: 90 (minutes), 12:00:00, 2-00:00:00",
    "mem": "of a node, such as 500G; 0 is all",
    "cpus_per_task": "of a node",
    "gpus_per_node": "such as 8 or h100:8; 0 trains on CPUs",
    "container": "image for Pyxis, which has tunesmith in it",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_launched(parser)
    parser.add_argument("--nodes", type=whole_number, default=1, metavar="N", help="default: 1")
    for key, text in SETTINGS.items():
        metavar = key.rpartition("_")[2].upper()
        if key == "gpus_per_node":
            metavar = "[TYPE:]N"
        parser.add_argument(f"--{key.replace('_', '-')}", metavar=metavar, help=text)
    parser.add_argument(
        "--exclusive", action="store_true", help="whole nodes; with --mem 0 all their memory"
    )
    line = "a line of the script before the run: --setup 'module load cuda'"
    parser.add_argument("--setup", action="append", default=[], metavar="LINE", help=line)
    other = "any other sbatch option: --sbatch-arg=--reservation=tuesday"
    parser.add_argument(
        "--sbatch-arg", dest="sbatch", action="append", default=[], metavar="OPTION", help=other
    )
    reasons = "at a time limit or after a lost node; 0: never (default: 5)"
    requeues = f"how often it may be requeued, {reasons}"
    parser.add_argument("--max-requeues", type=_count, default=5, metavar="N", help=requeues)
    default = "by the size of a checkpoint, from 300 on; a quarter of a short limit"
    warning = f"save this long before the time limit (default: {default})"
    parser.add_argument(
        "--warn-before", dest="warning", type=whole_number, metavar="SECONDS", help=warning
    )
    parser.add_argument(
        "--render",
        action="store_true",
        help="print the script, with the recipe inside, and do not submit it",
    )


def run(args: argparse.Namespace) -> None:
    fields = [field.name for field in dataclasses.fields(slurm.Request)]
    request = slurm.Request(**{name: vars(args)[name] for name in fields if name in args})
    # The login node's processor is not that of the nodes.
    recipe = launched_recipe(args, ranks=args.nodes * slurm.ranks_of(request))
    slurm.check_mesh_of_job(recipe, request)
    request = dataclasses.replace(request, saving=slurm.saving_seconds(recipe))
    words = [args.recipe, *args.overrides]
    if args.render:
        # It may be submitted on another machine, which has the files.
        try:
            slurm.check_reach(recipe, request, words)
        except UsageError as error:
            notify(f"warning: {error.where}: {error.what}, on this machine")
        folder = shell_path(recipe_file(recipe.output_dir).parent)
        notify(f"submit it where its files are: mkdir -p {folder}; sbatch FILE")
        print(slurm.render_script(recipe, request, holds_recipe=True), end="")
        return
    slurm.check_reach(recipe, request, words)
    check_free(recipe.output_dir)
    if is_finished(recipe, "submitted"):
        return
    job = slurm.submit(recipe, request)
    print(f"job {job.details['id']}; log: {job.log}")
    name = shell_word(job.name)
    stop = f"stop it: tunesmith stop {name}; queue: squeue --me"
    notify(f"follow it: tunesmith logs -f {name}; {stop}")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)
