"""Train a recipe on the nodes of a Docker swarm, such as two Sparks on a cable.

example:
  tunesmith launch swarm my-recipe.yaml  # on all nodes that are ready
  # here and on spark-b, as ssh knows it
  tunesmith launch swarm my-recipe.yaml --hosts spark-b
  tunesmith launch swarm my-recipe.yaml --render  # print only
  tunesmith logs -f runs/my-run
  tunesmith stop runs/my-run  # saves, and removes the service

Run it on any of the nodes. The others need docker, sshd and rsync; data,
model and image are copied to them. Swarm then runs it in the background, and
failed ranks restart from the newest checkpoint.
"""

import argparse
from pathlib import Path

from tunesmith.cli.options import whole_number
from tunesmith.host.signals import StopRequest
from tunesmith.tools.launch.cli_local import add_launched, announce, launched_recipe
from tunesmith.tools.launch.deploy import launch_on_swarm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_launched(parser)
    ready = "this one included (default: all that are ready)"
    parser.add_argument("--nodes", type=whole_number, metavar="N", help=ready)
    others = "the other nodes, as ssh names (default: all in the swarm)"
    parser.add_argument("--hosts", metavar="A,B", default="", help=others)
    parser.add_argument(
        "--image", default="tunesmith", help="docker image on this node (default: tunesmith)"
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=3,
        metavar="K",
        help="restarts of a node's ranks, at most (default: 3)",
    )
    further = "further mounts or variables of the service `ranks`"
    extra = f"a stack file that is merged over ours: {further}"
    parser.add_argument("--stack-extra", type=Path, metavar="FILE", help=extra)
    render = "print the stack file and start nothing"
    parser.add_argument("--render", action="store_true", help=render)


def run(args: argparse.Namespace) -> None:
    # The nodes that are ready are counted later: a swarm is of two at least.
    recipe = launched_recipe(args, ranks=args.nodes or 2)
    with StopRequest():
        job = launch_on_swarm(
            recipe,
            image=args.image,
            nodes=args.nodes,
            hosts=[host for host in args.hosts.split(",") if host],
            restarts=args.restarts,
            extra=args.stack_extra,
            render=args.render,
            debug=args.debug,
        )
    if job is not None:
        announce(job, "is deployed")
