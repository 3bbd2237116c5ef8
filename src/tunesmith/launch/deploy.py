"""`launch swarm`: bring a run to nodes that share no disk, and hand it to Swarm, which starts it again where it fails.

Files, model and image go over the cable, from this node alone; then the launcher ends.
"""

import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, TunesmithError, UsageError, is_secret_name
from tunesmith.launch.inputs import caches, find_secrets, hub_sources, recipe_inputs
from tunesmith.launch.jobs import name_of_run, save_job, state_folder, write_recipe
from tunesmith.launch.node import MERGE_NICS, count_gpus
from tunesmith.launch.rendezvous import Endpoint, family_of, route_to
from tunesmith.launch.ship import (
    Connection,
    ShippedFile,
    by_content,
    by_place,
    of_cache,
    place_here,
    require_image,
    ship,
    ship_image,
)
from tunesmith.launch.stack import LABEL, Stack
from tunesmith.launch.swarm import GPU, SwarmJob, SwarmNode, find_nodes, in_swarm

PASSED_ON = re.compile(
    r"(NCCL|GLOO)_\w+|OMP_NUM_THREADS|HF_HUB_OFFLINE|TUNESMITH_HEARTBEAT_SECONDS|WANDB_(PROJECT|ENTITY|MODE)"
)
SYSTEM = [
    Path("/", name)
    for name in "bin boot dev etc lib lib64 proc run sbin sys usr var/run var/lib/docker".split()
]


def launch_on_swarm(
    run: Run,
    *,
    image: str,
    nodes: int | None = None,
    hosts: Sequence[str] = (),
    restarts: int = 3,
    extra: Path | None = None,
    render: bool = False,
    debug: bool = False,
    say: Callable[[str], None],
) -> SwarmJob | None:
    """Bring all that a run needs to the nodes, and start it there; raises what `find_nodes`, `fetch` and `ship` do. A launch
    that fails leaves no service or secret. `render`: print the stack file instead, without secrets."""
    for path in (out := Path(run.output_dir).absolute(), *recipe_inputs(run)):
        refuse_exposed(path)
    if render and not in_swarm():
        stack = stack_without_swarm(out, hosts, nodes, restarts, say)
    else:
        chosen, excluded, manager = find_nodes(hosts, nodes)
        if not render:
            require_image(image)  # before large files are read, fetched and sent
        stack = replace(plan_stack(out, chosen, restarts, say), excluded=tuple(excluded))
    shipped = [(path, *by_content(path)) for path in recipe_inputs(run)]
    stack = replace(
        stack,
        image=image,
        debug=debug,
        mounts=tuple((place, str(path)) for path, place, _ in shipped),
    )
    if render:
        print(stack.text(extra), end="")
        return None
    job = SwarmJob(
        stack.name, stack.run_dir, details={"hosts": ",".join(node.address for node in chosen)}
    )
    job.check_ended()
    files, links = hub_files(run)
    files += [file for *_, found in shipped for file in found]
    recipe = write_recipe(run)
    save_job(job)
    place_here(files)
    files += [by_place(recipe), by_place(state_folder() / f"{job.name}.json")]
    for node in chosen:
        bring(files, links, [str(recipe.parent), *stack.cache], node, say)
    [image_id] = {ship_image(image, node.host) for node in chosen}
    stack = replace(stack, image=image_id)  # Swarm asks no registry for an id
    try:
        job.clean()  # of an earlier launch
        with Connection(manager) as connection:
            stack = replace(stack, secrets=tuple(make_secrets(stack.name, connection)))
            words = (
                "docker",
                "stack",
                "deploy",
                "--resolve-image",
                "never",
                "--compose-file",
                "-",
                stack.name,
            )
            connection.run(*words, given=stack.text(extra))
    except BaseException:
        with suppress(TunesmithError):
            job.clean()
        raise
    return job


def refuse_exposed(path: Path) -> None:
    """UsageError for what no container may have: the system, and a folder with keys, tokens or the docker socket."""
    from huggingface_hub import constants

    home = Path.home()
    own = [home / name for name in (".ssh", ".docker", ".gnupg", ".netrc")]
    for place in (path, path.resolve()):
        for folder in (*SYSTEM, *own, Path(constants.HF_TOKEN_PATH), home):
            if folder.is_relative_to(place) or (folder != home and place.is_relative_to(folder)):
                why, fix = (
                    f"{folder} is private",
                    "name a folder of its own, and copy there what is needed",
                )
                raise UsageError(
                    f"{path} is not given to a container", where=str(path), why=why, fix=fix
                )


def plan_stack(
    out: Path, nodes: Sequence[SwarmNode], restarts: int, say: Callable[[str], None]
) -> Stack:
    """The stack of a run directory on these nodes, which are looked at; without image, mounts and secrets. `say` takes
    warnings; MachineError where the nodes differ in a way that the run would meet."""
    looks = []
    for node in nodes:
        with Connection(node.host) as connection:
            looks.append(connection.ask("look"))
    for node, found in zip(nodes, looks, strict=True):
        if found["user"] != looks[0]["user"]:
            what, why = (
                f"you are user {found['user']} on {found['host']}",
                f"here you are {looks[0]['user']}",
            )
            raise MachineError(
                what,
                where="uid and gid",
                why=why,
                fix="use accounts of the same numbers: usermod -u",
            )
        if node.gpus != nodes[0].gpus or (found["gpu"] and not node.gpus):
            what = f"{found['host']} offers the swarm {node.gpus or 'no GPU'}"
            why, fix = (
                f"this node {nodes[0].gpus or 'none'}",
                "tunesmith doctor --fix, on each node",
            )
            raise MachineError(what, where="docker node inspect", why=why, fix=fix)
        for name in [
            name for links in found["rdma"].values() for name, mtu in links.items() if mtu != "9000"
        ]:
            say(
                f"warning: {name} on {found['host']} has not MTU 9000, and is slow: ip link set {name} mtu 9000"
            )
    passed = passed_variables(sorted({device for found in looks for device in found["rdma"]}))
    address = route_to(nodes[1].address) if nodes[1:] else "127.0.0.1"
    with socket.socket(family_of(address)) as probe:
        probe.bind((address, 0))
        endpoint = Endpoint(address, probe.getsockname()[1], address, "").place
    cache = str(caches()["HF_HUB_CACHE"]), str(caches()["HF_DATASETS_CACHE"])
    return Stack(
        name=name_of_run("swarm", str(out)), run_dir=str(out), image="", nodes=len(nodes), endpoint=endpoint,
        restarts=restarts, cache=cache, user=tuple(looks[0]["user"]), gpus=nodes[0].gpus,
        environment=tuple(sorted(passed.items())),
    )  # fmt: skip


def stack_without_swarm(
    out: Path, hosts: Sequence[str], count: int | None, restarts: int, say: Callable[[str], None]
) -> Stack:
    """The stack for as many nodes as the flags name, all as this one; nothing is asked of Docker or of another node."""
    nodes = count or 1 + len(hosts)
    gpus = count_gpus()
    here = SwarmNode("", "", (GPU[0], gpus) if gpus else None)
    stack = plan_stack(out, [here], restarts, say)
    say(
        f"warning: this node is in no swarm, or docker does not answer: rendered for --nodes {nodes} such as this one"
    )
    if nodes == 1:
        return stack
    port = stack.endpoint.rpartition(":")[2]
    return replace(stack, nodes=nodes, endpoint=f"{socket.gethostname()}:{port}")


def passed_variables(rdma_devices: Sequence[str]) -> dict[str, str]:
    """The variables of this environment that ranks get, and those that NCCL needs for RDMA unless they are set here."""
    passed = {
        name: value
        for name, value in os.environ.items()
        if PASSED_ON.fullmatch(name) and not is_secret_name(name)
    }
    if rdma_devices:
        # Exact names; a port of a Spark has two
        passed.setdefault("NCCL_IB_HCA", "=" + ",".join(rdma_devices))
    if "NCCL_IB_HCA" in passed:
        passed.setdefault(*MERGE_NICS)
    return passed


def hub_files(run: Run) -> tuple[list[ShippedFile], list[tuple[str, str]]]:
    """Get what a recipe names from the Hub into this node's cache -> its files and links (place, target) there."""
    models = filter(None, (run.model.name, run.model.tokenizer, run.adapter.from_))
    names, sources = [name for name in models if not os.path.isabs(name)], hub_sources(run)
    if not names and not sources:
        return [], []
    from datasets import config

    from tunesmith.data.source import read_rows
    from tunesmith.hub.fetch import fetch, fetch_without_weights, repo_cache

    cached: list[tuple[Path, Path | None]] = []
    for name in names:
        if name == run.model.name:
            snapshot = fetch(run.model)
        elif name == run.model.tokenizer:
            snapshot = fetch_without_weights(name)
        else:
            from tunesmith.adapter.peft_files import find_adapter  # which loads torch

            snapshot = find_adapter(name)
        cached.append((repo_cache(name), snapshot))
    for source in sources:
        read_rows(source)
        cached.append((repo_cache(source.source, "dataset"), None))
        cached.append((Path(config.HF_DATASETS_CACHE, source.source.replace("/", "___")), None))
    listed = [of_cache(folder, snapshot) for folder, snapshot in cached]
    return [file for files, _ in listed for file in files], [
        link for _, links in listed for link in links
    ]


def bring(
    files: Sequence[ShippedFile],
    links: Sequence[tuple[str, str]],
    folders: Sequence[str],
    node: SwarmNode,
    say: Callable[[str], None],
) -> None:
    """Make a node's folders, and bring it the files and links; MachineError where a folder cannot be written to."""
    from tunesmith.hub.download import FetchProgress

    with Connection(node.host) as connection:
        for folder in folders:
            connection.run("mkdir", "-p", folder)
            connection.run("test", "-w", folder)
    if not node.host:
        return
    sent = ship(files, node.host, FetchProgress())
    with Connection(node.host) as connection:
        for place, target in links:
            connection.run("mkdir", "-p", os.path.dirname(place))
            connection.run("ln", "-sfn", target, place)
    say(f"{node.host}: {sent:,} bytes sent")


def make_secrets(name: str, manager: Connection) -> list[tuple[str, str]]:
    """Give the swarm the Hub's token and the keys of trackers that the user has -> as `Stack.secrets`. They go by standard
    input: not to a file, a command line or a log."""
    made = []
    for source, content in find_secrets().items():
        made.append((source, f"{name}-{source.lower()}-{time.time_ns()}"))
        words = ("docker", "secret", "create", "--label", f"{LABEL}={name}", made[-1][1], "-")
        manager.run(*words, given=content)
    return made
