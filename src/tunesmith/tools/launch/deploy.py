"""`launch swarm`: bring a run to nodes that share no disk, and start it as a service of Swarm.

Files, model and image go over the cable, from this node alone; then the launcher ends. Swarm
restarts a run that fails.
"""

import logging
import os
import re
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tunesmith.checkpoint.start_adapter import find_adapter
from tunesmith.config.schema import Run
from tunesmith.data.source.open_source import read_rows
from tunesmith.errors import MachineError, TunesmithError
from tunesmith.host.shell import shell_word
from tunesmith.launch.jobs import check_free, name_of_run, save_job, state_folder, write_recipe
from tunesmith.launch.node import MERGE_NICS
from tunesmith.launch.rendezvous import Endpoint, family_of, route_to
from tunesmith.launch.ssh import require_image, run_on, send_files, send_image, try_on
from tunesmith.tools.launch.inputs import (
    caches,
    check_exposed,
    copy_input,
    find_secrets,
    hub_sources,
    passed_variables,
    place_by_content,
    recipe_inputs,
)
from tunesmith.tools.launch.stack import JOB_LABEL, Stack
from tunesmith.tools.launch.swarm import SwarmJob, SwarmNode, find_nodes

log = logging.getLogger(__name__)

# Variables of this environment that the ranks get
PASSED_TO_SWARM = re.compile(
    r"(NCCL|GLOO)_\w+|OMP_NUM_THREADS|HF_HUB_OFFLINE|TUNESMITH_HEARTBEAT_SECONDS"
    r"|WANDB_(PROJECT|ENTITY|MODE)"
)
# Of a rendered stack, so that two of them are alike: that of torchrun.
RENDERED_PORT = 29500


def launch_on_swarm(
    run: Run,
    *,
    image: str,
    nodes: int | None,
    hosts: Sequence[str],
    restarts: int,
    extra: Path | None,
    render: bool,
    debug: bool,
) -> SwarmJob | None:
    """Bring all that a run needs to the nodes, and start it there.

    A launch that fails leaves no service or secret.

    Args:
        nodes, hosts: as of `find_nodes`.
        extra: a file of the user's that is laid over the stack file.
        render: print the stack file instead, without secrets, and write nothing.

    Raises:
        What `find_nodes`, `fetch` and `send_files` do.
    """
    out = Path(run.output_dir).absolute()
    check_free(run.output_dir)
    inputs = recipe_inputs(run)
    for path in (out, *inputs):
        check_exposed(path)
    chosen, excluded, manager = find_nodes(hosts, nodes)
    # Before large files are read, fetched and sent.
    image_id = "" if render else require_image(image)
    mounts = [(str(place_by_content(path)), str(path)) for path in inputs]
    stack = replace(
        plan_stack(out, chosen, restarts),
        excluded=tuple(excluded),
        image=image,
        debug=debug,
        mounts=tuple(mounts),
    )
    if render:
        host = stack.endpoint.rpartition(":")[0]
        text = replace(stack, endpoint=f"{host}:{RENDERED_PORT}").text(extra)
        log.info("recipe, files and image are copied to the nodes without --render")
        print(text, end="")
        return None
    addresses = ",".join(node.address for node in chosen)
    job = SwarmJob(stack.name, stack.run_dir, details={"hosts": addresses})
    # Before the nodes are touched: a run that is at work would lose its files and service.
    job.check_ended()
    _prepare_nodes(run, job, chosen, stack)
    for node in chosen[1:]:
        log.info(f"image to {node.host}")
        send_image(image, image_id, node.host)
    # Swarm asks no registry for an id.
    _start_service(job, replace(stack, image=image_id), manager, extra)
    return job


def _prepare_nodes(run: Run, job: SwarmJob, nodes: Sequence[SwarmNode], stack: Stack) -> None:
    """Bring the files of a run to all nodes: its inputs, what it has of the Hub, and its note.

    MachineError where a folder cannot be written to.
    """
    cached = hub_files(run)
    recipe = write_recipe(run)
    save_job(job)
    for place, path in stack.mounts:
        copy_input(Path(path), Path(place))
    # By the note `status`, `logs` and `stop` work on each node.
    files = [*cached, str(recipe), str(state_folder() / f"{job.name}.json")]
    files += [place for place, _ in stack.mounts]
    for node in nodes:
        for folder in (str(recipe.parent), *stack.cache):
            run_on(node.host, "mkdir", "-p", folder)
            run_on(node.host, "test", "-w", folder)
    for node in nodes[1:]:
        log.info(f"files to {node.host}")
        send_files(files, node.host)


def _start_service(job: SwarmJob, stack: Stack, manager: str, extra: Path | None) -> None:
    """Have the swarm start the stack; where that fails nothing of it stays."""
    # Even a start that is cut by ctrl-C leaves neither a service nor secrets behind.
    try:
        # What an earlier launch has left.
        job.clean()
        stack = replace(stack, secrets=create_secrets(stack.name, manager))
        flags = ("--resolve-image", "never", "--compose-file", "-")
        words = ("docker", "stack", "deploy", *flags, stack.name)
        run_on(manager, *words, text=stack.text(extra))
    except BaseException:
        with suppress(TunesmithError):
            job.clean()
        raise


class NodeLook(NamedTuple):
    """The facts that a node reports of itself.

    Attributes:
        user: of the launch there: uid and gid.
        rdma: the RDMA devices whose link is up.
    """

    host: str
    user: tuple[int, int]
    has_gpu: bool
    rdma: list[str]


# What is not there prints nothing.
LOOK = (
    "hostname; id -u; id -g; ls /dev/nvidiactl 2>/dev/null; "
    "grep -l ACTIVE /sys/class/infiniband/*/ports/1/state 2>/dev/null"
)


def look_at(host: str) -> NodeLook:
    """Ask a node who the user is there, for its GPU and its RDMA devices."""
    name, user, group, *files = try_on(host, "sh", "-c", LOOK).stdout.splitlines()
    devices = [Path(file).parts[4] for file in files if file.startswith("/sys/")]
    return NodeLook(name, (int(user), int(group)), "/dev/nvidiactl" in files, sorted(devices))


def plan_stack(out: Path, nodes: Sequence[SwarmNode], restarts: int) -> Stack:
    """Return the stack of a run directory on these nodes, without image, mounts and secrets.

    Raises:
        MachineError: the nodes differ in a way that affects the run.
    """
    looks = [look_at(node.host) for node in nodes]
    for node, look in zip(nodes, looks, strict=True):
        _check_alike(node, look, nodes[0], looks[0])
    devices = sorted({device for look in looks for device in look.rdma})
    # The address at which the other nodes reach this one; alone, the loopback is enough.
    address = route_to(nodes[1].address) if len(nodes) > 1 else "127.0.0.1"
    # A port that is free now.
    with socket.socket(family_of(address)) as probe:
        probe.bind((address, 0))
        endpoint = Endpoint(address, probe.getsockname()[1], address, "")
    folders = caches()
    return Stack(
        name=name_of_run("swarm", str(out)),
        run_dir=str(out),
        image="",
        nodes=len(nodes),
        endpoint=endpoint.place,
        restarts=restarts,
        cache=(str(folders["HF_HUB_CACHE"]), str(folders["HF_DATASETS_CACHE"])),
        user=looks[0].user,
        gpus=nodes[0].gpus,
        environment=tuple(sorted(variables_of_ranks(devices).items())),
    )


def _check_alike(node: SwarmNode, look: NodeLook, here: SwarmNode, look_here: NodeLook) -> None:
    """MachineError where a node has other users or GPUs than this one."""
    # Files of the run belong to one user on all nodes.
    if look.user != look_here.user:
        raise MachineError(
            f"you are user {look.user} on {look.host}",
            where="uid and gid",
            why=f"here you are {look_here.user}",
            fix="use the same uid and gid: usermod -u",
        )
    offers_no_gpu = look.has_gpu and not node.gpus
    if node.gpus != here.gpus or offers_no_gpu:
        raise MachineError(
            f"{look.host} offers the swarm {node.gpus or 'no GPU'}",
            where="docker node inspect",
            why=f"this node {here.gpus or 'none'}",
            fix=f"tunesmith doctor --pair {shell_word(look.host)}",
        )


def variables_of_ranks(rdma_devices: Sequence[str]) -> dict[str, str]:
    """The variables that ranks get: of this environment, and those that NCCL needs for RDMA."""
    passed = passed_variables(PASSED_TO_SWARM)
    if rdma_devices:
        # `=`: exact names. A port of a Spark has two.
        passed.setdefault("NCCL_IB_HCA", "=" + ",".join(rdma_devices))
    if "NCCL_IB_HCA" in passed:
        passed.setdefault(*MERGE_NICS)
    return passed


def hub_files(run: Run) -> list[str]:
    """Get what a recipe names from the Hub into this node's cache -> its folders, which are at the
    same places on every node.
    """
    models = filter(None, (run.model.name, run.model.tokenizer, run.adapter.from_))
    names = [name for name in models if not os.path.isabs(name)]
    sources = hub_sources(run)
    # The imports below take seconds.
    if not names and not sources:
        return []
    from datasets import config

    from tunesmith.hub.fetch import fetch, fetch_without_weights, repo_cache

    paths: list[Path] = []
    for name in names:
        if name == run.model.name:
            fetch(run.model)
        elif name == run.model.tokenizer:
            fetch_without_weights(name)
        else:
            find_adapter(name)
        paths.append(repo_cache(name))
    for source in sources:
        # Which loads it into the caches.
        read_rows(source)
        paths.append(repo_cache(source.source, "dataset"))
        paths.append(Path(config.HF_DATASETS_CACHE, source.source.replace("/", "___")))
    return [str(path.absolute()) for path in paths if path.exists()]


def create_secrets(name: str, manager: str) -> tuple[tuple[str, str], ...]:
    """Give the swarm the Hub's token and the user's keys of trackers -> as `Stack.secrets`.

    They go by standard input: not to a file, a command line or a log.
    """
    label = f"{JOB_LABEL}={name}"
    secrets = []
    for source, content in find_secrets().items():
        secret = f"{name}-{source.lower()}-{time.time_ns()}"
        words = ("docker", "secret", "create", "--label", label, secret, "-")
        run_on(manager, *words, text=content)
        secrets.append((source, secret))
    return tuple(secrets)
