"""Train a recipe on the nodes of a Docker swarm, such as two connected DGX Sparks.

example:
  tunesmith launch swarm my-recipe.yaml  # on all nodes that are ready
  # on this node and on spark-b, a host name for ssh
  tunesmith launch swarm my-recipe.yaml --hosts spark-b
  tunesmith launch swarm my-recipe.yaml --render  # print only
  tunesmith logs -f runs/my-run
  tunesmith stop runs/my-run  # saves, and removes the service

Run the command on any of the nodes. The other nodes need docker, sshd and
rsync. Data, model and image are copied to them. Swarm then trains in the
background, and failed ranks restart from the newest checkpoint.
"""

import argparse
from pathlib import Path

from tunesmith.cli.options import whole_number
from tunesmith.host.signals import StopRequest
from tunesmith.tools.launch.cli_local import (
    add_launched,
    announce,
    is_finished,
    launched_recipe,
)
from tunesmith.tools.launch.deploy import launch_on_swarm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_launched(parser)
    parser.add_argument(
        "--nodes",
        type=whole_number,
        metavar="N",
        help="number of nodes, including this one (default: all nodes that are ready)",
    )
    parser.add_argument(
        "--hosts",
        metavar="A,B",
        default="",
        help="ssh host names of the other nodes (default: all nodes of the swarm)",
    )
    parser.add_argument(
        "--image",
        default="tunesmith",
        help="name of the Docker image on this node (default: tunesmith)",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=3,
        metavar="K",
        help="maximum number of restarts of a node's ranks (default: 3)",
    )
    parser.add_argument(
        "--stack-extra",
        type=Path,
        metavar="FILE",
        help="stack file that is merged into the generated stack file, for example for mounts or "
        "variables of the service `ranks`",
    )
    parser.add_argument(
        "--render", action="store_true", help="print the stack file and start nothing"
    )


def run(args: argparse.Namespace) -> None:
    # Without --nodes, assume 2 nodes, because the nodes that are ready are counted later.
    recipe = launched_recipe(args, ranks=args.nodes or 2)
    if not args.render and is_finished(recipe, "deployed"):
        return
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
