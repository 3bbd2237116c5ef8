"""Train a recipe on the nodes of a Docker swarm, such as two Sparks on a cable, from any one of them.

examples:
  tunesmith launch swarm my-recipe.yaml                          # on all nodes that are ready
  tunesmith launch swarm my-recipe.yaml --hosts spark-b          # on this node and on spark-b, as ssh knows it
  tunesmith launch swarm my-recipe.yaml --render                 # print the stack file, start nothing
  tunesmith logs -f runs/my-run
  tunesmith stop runs/my-run                                     # saves, and removes all but the run's files

The other node needs docker, sshd and python3. Data, model and image are brought there. Then Swarm has the run: it goes on when this
terminal is closed, and failed ranks resume from the newest checkpoint.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from tunesmith.cli.launch_local import add_launched, announce, launched_recipe
from tunesmith.cli.options import whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_launched(parser)
    ready, others = (
        "this one included (default: all that are ready)",
        "the other nodes, as ssh takes them",
    )
    parser.add_argument("--nodes", type=whole_number, metavar="N", help=ready)
    parser.add_argument(
        "--hosts", metavar="A,B", default="", help=f"{others} (default: by looking)"
    )
    parser.add_argument(
        "--image", default="tunesmith", help="docker image on this node (default: tunesmith)"
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=3,
        metavar="K",
        help="of a node's ranks, at most (default: 3)",
    )
    extra = (
        "a stack file that is laid over ours: further mounts or variables of the service `ranks`"
    )
    parser.add_argument("--stack-extra", type=Path, metavar="FILE", help=extra)
    parser.add_argument("--render", action="store_true", help="print the stack file and end")


def run(args: argparse.Namespace) -> None:
    from tunesmith.host.signals import StopRequest
    from tunesmith.launch.deploy import launch_on_swarm

    recipe, hosts = launched_recipe(args), [host for host in args.hosts.split(",") if host]
    with StopRequest():
        job = launch_on_swarm(
            recipe, image=args.image, nodes=args.nodes, hosts=hosts, restarts=args.restarts, extra=args.stack_extra,
            render=args.render, debug=args.debug, say=partial(print, file=sys.stderr, flush=True),
        )  # fmt: skip
    if job is not None:
        announce(job, "is deployed")
