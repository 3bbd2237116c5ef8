"""`launch swarm`: copy a run to nodes that share no disk, and start it as a Docker Swarm service.

This node sends the files, the model and the image to all other nodes, and starts the service. Then
the command ends. If the run fails, Swarm restarts it.
"""

import logging
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tunesmith.checkpoint.start_adapter import find_adapter
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, TunesmithError
from tunesmith.host.chips import list_gpus
from tunesmith.host.shell import shell_word
from tunesmith.launch.job import save_job, state_folder
from tunesmith.launch.jobs import check_free, name_of_run, write_recipe
from tunesmith.launch.node import MERGE_NICS
from tunesmith.launch.rendezvous import Endpoint, family_of, route_to
from tunesmith.launch.ssh import (
    check_other_node,
    require_image,
    run_on,
    send_files,
    send_image,
    try_on,
)
from tunesmith.launch.swarm_job import JOB_LABEL, SwarmJob
from tunesmith.rows.source.open_source import read_rows
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
from tunesmith.tools.launch.stack import Stack, read_extra
from tunesmith.tools.launch.swarm import GPU_RESOURCES, SwarmNode, find_nodes

log = logging.getLogger(__name__)

# Environment variables of this process that are passed to the ranks.
PASSED_TO_SWARM = re.compile(
    r"(NCCL|GLOO)_\w+|OMP_NUM_THREADS|HF_HUB_OFFLINE|TUNESMITH_HEARTBEAT_SECONDS"
    r"|WANDB_(PROJECT|ENTITY|MODE)"
)
# Port in the output of --render. It is torchrun's default. A free port would make the output
# different in each call.
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
    """Copy all files that a run needs to the nodes, and start the run there.

    A failed launch leaves no service and no secret. Errors of `find_nodes`, `fetch` and
    `send_files` are raised unchanged.

    Args:
        image: the name of the Docker image on this node.
        nodes: the number of nodes. None means all nodes that are ready.
        hosts: the ssh names of the other nodes. If empty, all nodes of the swarm are used.
        restarts: the maximum number of restarts of a node's ranks.
        extra: a file of the user that is merged into the stack file.
        render: only print the stack file without secrets, and return None.
        debug: write more details to the log.
    """
    out = Path(run.output_dir).absolute()
    for host in hosts:
        check_other_node(host, "--hosts")
    # Read the user's file before large files are copied.
    more = read_extra(extra) if extra else {}
    check_free(run.output_dir)
    inputs = recipe_inputs(run)
    for path in (out, *inputs):
        check_exposed(path)
    # Check the image before large files are read, fetched and sent.
    image_id = "" if render else require_image(image)
    mounts = [(str(place_by_content(path)), str(path)) for path in inputs]
    # Printing asks no daemon and no other node. It assumes nodes like this one.
    gpus = (GPU_RESOURCES[0], len(list_gpus())) if list_gpus() else None
    chosen = [SwarmNode("", "", gpus)]
    excluded: list[str] = []
    manager = ""
    if not render:
        chosen, excluded, manager = find_nodes(hosts, nodes)
    stack = replace(
        plan_stack(out, chosen, restarts),
        excluded=tuple(excluded),
        image=image,
        debug=debug,
        mounts=tuple(mounts),
    )
    if render:
        endpoint = f"{socket.gethostname()}:{RENDERED_PORT}"
        stack = replace(stack, nodes=nodes or len(hosts) + 1, endpoint=endpoint)
        text = stack.text(more)
        log.info(
            "--render copies nothing to the nodes; without --render, the recipe, the "
            "input files and the image are copied"
        )
        print(text, end="")
        return None
    details = {"hosts": ",".join(node.address for node in chosen)}
    job = SwarmJob(stack.name, stack.run_dir, details=details)
    # Check that no earlier job of this run is active before the nodes are changed. Otherwise the
    # active run would lose its files and its service.
    job.check_ended()
    _prepare_nodes(run, job, chosen, stack)
    for node in chosen[1:]:
        log.info(f"copying the image to {node.host}")
        send_image(image, image_id, node.host)
    # Use the image id instead of the name, so that Swarm does not look for a newer image in a
    # registry.
    _start_service(job, replace(stack, image=image_id), manager, more)
    return job


def _prepare_nodes(run: Run, job: SwarmJob, nodes: Sequence[SwarmNode], stack: Stack) -> None:
    """Copy a run's input files, its files from the Hub, and the job file to all nodes.

    Raise MachineError if a folder is not writable.
    """
    cached = hub_files(run)
    recipe = write_recipe(run)
    save_job(job)
    for place, path in stack.mounts:
        copy_input(Path(path), Path(place))
    # Also send the job file, so that `status`, `logs` and `stop` work on each node.
    files = [*cached, str(recipe), str(state_folder() / f"{job.name}.json")]
    files += [place for place, _ in stack.mounts]
    for node in nodes:
        for folder in (str(recipe.parent), *stack.cache):
            run_on(node.host, "mkdir", "-p", folder)
            run_on(node.host, "test", "-w", folder)
    for node in nodes[1:]:
        log.info(f"copying files to {node.host}")
        send_files(files, node.host)


def _start_service(job: SwarmJob, stack: Stack, manager: str, extra: Mapping[str, object]) -> None:
    """Deploy the stack with the Hub's token and the user's keys of trackers as secrets.

    If the deployment fails, remove everything that it created.
    """
    # Catch BaseException, because a service or secrets must be removed after ctrl-C too.
    try:
        # Remove the remains of an earlier launch.
        job.clean()
        label = f"{JOB_LABEL}={stack.name}"
        for source, content in find_secrets().items():
            secret = f"{stack.name}-{source.lower()}-{time.time_ns()}"
            # The value is sent over standard input, so it appears in no file, command line or log.
            create = ("docker", "secret", "create", "--label", label, secret, "-")
            run_on(manager, *create, text=content)
            stack = replace(stack, secrets=(*stack.secrets, (source, secret)))
        flags = ("--resolve-image", "never", "--compose-file", "-")
        run_on(manager, "docker", "stack", "deploy", *flags, stack.name, text=stack.text(extra))
    except BaseException:
        with suppress(TunesmithError):
            job.clean()
        raise


class NodeFacts(NamedTuple):
    """User, GPU and RDMA devices of a node, which are read over ssh.

    Attributes:
        host: the host name.
        user: the uid and gid of the user on this node.
        has_gpu: whether the node has an NVIDIA GPU.
        rdma: the RDMA devices with an active link.
    """

    host: str
    user: tuple[int, int]
    has_gpu: bool
    rdma: list[str]


# Shell command whose output `read_facts` parses. It prints nothing for devices that do not exist.
FACTS_COMMAND = (
    "hostname; id -u; id -g; ls /dev/nvidiactl 2>/dev/null; "
    "grep -l ACTIVE /sys/class/infiniband/*/ports/1/state 2>/dev/null"
)


def read_facts(host: str) -> NodeFacts:
    """Read the user, the GPU and the RDMA devices of a node over ssh."""
    name, user, group, *files = try_on(host, "sh", "-c", FACTS_COMMAND).stdout.splitlines()
    devices = [Path(file).parts[4] for file in files if file.startswith("/sys/")]
    return NodeFacts(name, (int(user), int(group)), "/dev/nvidiactl" in files, sorted(devices))


def plan_stack(out: Path, nodes: Sequence[SwarmNode], restarts: int) -> Stack:
    """Return the stack for a run on these nodes. Image, mounts and secrets are set later.

    Raises:
        MachineError: if the nodes differ in a way that affects the run.
    """
    facts_by_node = [read_facts(node.host) for node in nodes]
    for node, facts in zip(nodes, facts_by_node, strict=True):
        _check_alike(node, facts, nodes[0], facts_by_node[0])
    devices = sorted({device for facts in facts_by_node for device in facts.rdma})
    # Use the address at which the other nodes reach this node. If there are no other nodes, use the
    # loopback address.
    address = route_to(nodes[1].address) if len(nodes) > 1 else "127.0.0.1"
    # Port 0 makes the system choose a free port.
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
        user=facts_by_node[0].user,
        gpus=nodes[0].gpus,
        environment=tuple(sorted(variables_of_ranks(devices).items())),
    )


def _check_alike(node: SwarmNode, facts: NodeFacts, here: SwarmNode, own_facts: NodeFacts) -> None:
    """Raise MachineError if the user id or the offered GPUs of a node differ from this node's."""
    # The files of the run must belong to the same user on all nodes.
    if facts.user != own_facts.user:
        raise MachineError(
            f"your uid and gid are {facts.user} on {facts.host}, but {own_facts.user} on this node",
            where="uid and gid",
            fix="use the same uid and gid on all nodes (usermod -u)",
        )
    offers_no_gpu = facts.has_gpu and not node.gpus
    if node.gpus != here.gpus or offers_no_gpu:
        raise MachineError(
            f"Docker Swarm sees {_gpus_text(node)} on {facts.host}",
            where="docker node inspect",
            why="all nodes must offer their GPUs, and the same number of them; Docker Swarm sees "
            f"{_gpus_text(here)} on this node",
            fix=f"run tunesmith doctor --pair {shell_word(facts.host)}",
        )


def _gpus_text(node: SwarmNode) -> str:
    """Return the GPUs that a node offers, such as `1 x NVIDIA_GPU`."""
    return f"{node.gpus[1]} x {node.gpus[0]}" if node.gpus else "no GPU"


def variables_of_ranks(rdma_devices: Sequence[str]) -> dict[str, str]:
    """Return the environment variables of the ranks.

    The result has selected variables of this process, and NCCL's settings for RDMA.
    """
    passed = passed_variables(PASSED_TO_SWARM)
    if rdma_devices:
        # "=" makes NCCL match exact names. List all devices: one port of a DGX Spark has two.
        passed.setdefault("NCCL_IB_HCA", "=" + ",".join(rdma_devices))
    if "NCCL_IB_HCA" in passed:
        passed.setdefault(*MERGE_NICS)
    return passed


def hub_files(run: Run) -> list[str]:
    """Download the models and data sets of a recipe from the Hub into this node's cache.

    Return their folders in the cache. The paths of the folders are the same on every node.
    """
    models = filter(None, (run.model.name, run.model.tokenizer, run.adapter.from_))
    names = [name for name in models if not os.path.isabs(name)]
    sources = hub_sources(run)
    # Return before the following imports, which take seconds.
    if not names and not sources:
        return []
    from tunesmith.hub.fetch import fetch, fetch_without_weights, repo_cache

    paths = []
    for name in names:
        if name == run.model.name:
            fetch(run.model)
        elif name == run.model.tokenizer:
            fetch_without_weights(name)
        else:
            find_adapter(name)
        paths.append(repo_cache(name))
    for source in sources:
        # Reading the rows downloads the data set into the caches.
        read_rows(source)
        paths.append(repo_cache(source.source, "dataset"))
    return [str(path.absolute()) for path in paths if path.exists()]
