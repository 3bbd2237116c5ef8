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

Before the time limit the run saves a checkpoint. Then the job is requeued and
resumes, at most --max-requeues times. Access tokens are not sent to the job:
fetch the model first (`tunesmith fetch`), and log in to experiment trackers on
the login node. See docs/slurm.md.
"""

import argparse
import dataclasses

from tunesmith.cli.options import notify, whole_number
from tunesmith.config.schema import Parallel
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.launch.jobs import check_free, recipe_file
from tunesmith.parallel.mesh_shape import possible_shapes
from tunesmith.tools.launch import slurm
from tunesmith.tools.launch.cli_local import add_launched, is_finished, launched_recipe

# Field of `slurm.JobRequest` -> help text of the option with the same name.
SETTINGS = {
    "partition": "partition that the job is submitted to",
    "account": "account that the job is charged to",
    "qos": "quality of service of the job",
    "constraint": "feature that the nodes must have, such as h100",
    "time": "time limit, such as 90 (minutes), 12:00:00 or 2-00:00:00",
    "mem": "memory per node, such as 500G; 0 is all memory",
    "cpus_per_task": "CPUs per node",
    "gpus_per_node": "GPUs per node, such as 8 or h100:8; 0 trains on CPUs",
    "container": "container image for Pyxis, with tunesmith installed",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_launched(parser)
    parser.add_argument(
        "--nodes", type=whole_number, default=1, metavar="N", help="number of nodes (default: 1)"
    )
    for key, text in SETTINGS.items():
        metavar = key.rpartition("_")[2].upper()
        if key == "gpus_per_node":
            metavar = "[TYPE:]N"
        parser.add_argument(f"--{key.replace('_', '-')}", metavar=metavar, help=text)
    parser.add_argument(
        "--exclusive",
        action="store_true",
        help="do not share the nodes with other jobs; add --mem 0 to use all their memory",
    )
    parser.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="line of the script to execute before the run, such as --setup 'module load cuda'",
    )
    parser.add_argument(
        "--sbatch-arg",
        dest="sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other sbatch option, such as --sbatch-arg=--reservation=tuesday",
    )
    parser.add_argument(
        "--max-requeues",
        type=int,
        default=5,
        metavar="N",
        help="maximum number of times that the job is requeued after the time limit or a lost node "
        "(default: 5; 0 never requeues)",
    )
    parser.add_argument(
        "--warn-before",
        dest="warning",
        type=whole_number,
        metavar="SECONDS",
        help="seconds before the time limit at which the run saves (default: 300, or 1800 for full "
        "fine-tuning, at most a quarter of the limit)",
    )
    parser.add_argument(
        "--render",
        action="store_true",
        help="print the script with the recipe inside, and do not submit it",
    )


def run(args: argparse.Namespace) -> None:
    fields = [field.name for field in dataclasses.fields(slurm.JobRequest)]
    request = slurm.JobRequest(**{name: vars(args)[name] for name in fields if name in args})
    # Pass the number of ranks, because the login node and the compute nodes have different
    # hardware.
    ranks = args.nodes * slurm.ranks_of(request)
    recipe = launched_recipe(args, ranks=ranks)
    if recipe.parallel != Parallel():
        # Check that the recipe's mesh fits the number of ranks.
        possible_shapes(recipe.parallel, ranks)
    words = [args.recipe, *args.overrides]
    if args.render:
        # Only warn about missing files, because the script may be submitted on another machine that
        # has the files.
        try:
            slurm.check_reach(recipe, request, words)
        except UsageError as error:
            notify(f"warning: this machine cannot submit the job: {error.what} ({error.where})")
        folder = shell_path(recipe_file(recipe.output_dir).parent)
        notify(
            "save the script as FILE, and run these commands on a machine that has the job's "
            f"files: mkdir -p {folder}; sbatch FILE"
        )
        print(slurm.render_script(recipe, request, holds_recipe=True), end="")
        return
    slurm.check_reach(recipe, request, words)
    check_free(recipe.output_dir)
    if is_finished(recipe, "submitted"):
        return
    job = slurm.submit(recipe, request)
    print(f"job {job.details['id']}; log: {job.log}")
    name = shell_word(job.name)
    stop = f"stop the job: tunesmith stop {name}; show the queue: squeue --me"
    notify(f"follow the log: tunesmith logs -f {name}; {stop}")
