"""Train a recipe in a container on this machine.

example:
  docker build -f docker/Dockerfile -t tunesmith .  # once, in a clone
  tunesmith launch docker my-recipe.yaml
  tunesmith launch docker my-recipe.yaml --detach train.duration='2 h'
  tunesmith launch docker my-recipe.yaml --render  # print the command only

The run has one rank per GPU, or one process if there is no GPU. The recipe's
files, the run directory and the caches are mounted at the same paths as on this
machine, and the container runs as your user. Signals and exit codes are those
of `train`: ctrl-C saves after the current step and exits with 75.
"""

import argparse

from tunesmith.cli.options import notify
from tunesmith.host.chips import list_gpus
from tunesmith.host.shell import shell_word
from tunesmith.tools.launch import docker
from tunesmith.tools.launch.cli_local import add_launched, announce, launched_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_launched(parser)
    parser.add_argument(
        "--image", default="tunesmith", metavar="NAME", help="image to run (default: tunesmith)"
    )
    parser.add_argument(
        "--detach",
        action="store_true",
        help="run in the background, even after the terminal is closed",
    )
    parser.add_argument("--render", action="store_true", help="only print the docker command")


def run(args: argparse.Namespace) -> int:
    recipe = launched_recipe(args)
    if args.render:
        job = docker.docker_job(recipe)
        mounts = docker.find_mounts(recipe)
        words = docker.create_words(job, args.image, mounts, debug=args.debug)
        if not list_gpus():
            notify("this machine has no GPU; on a machine with GPUs, add --gpus=all")
        print("docker run --rm", *map(shell_word, words), sep=" \\\n  ")
        return 0
    job = docker.start_container(recipe, args.image, debug=args.debug)
    if not args.detach:
        return docker.follow_container(job)
    announce(job, "trains in the background")
    return 0
