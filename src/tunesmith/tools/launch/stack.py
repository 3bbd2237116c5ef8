"""The stack file of a run on a Docker swarm: one service with one task per node.

Swarm cannot pass devices to a container (moby/swarmkit#1244). Therefore NVIDIA's runtime must be
the default runtime, and NVIDIA_MOFED=enabled makes it add /dev/infiniband. Swarm ignores `ipc` and
`shm_size`, so a tmpfs is mounted as shared memory. The container has no ssh server, no Docker
socket and no folder with a token. It runs as the user who launched the run.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import UsageError
from tunesmith.launch.jobs import agent_words, recipe_file
from tunesmith.launch.swarm_job import JOB_LABEL, SECONDS_TO_SAVE, SERVICE
from tunesmith.tools.launch.inputs import SECRETS

# Maximum size of the shared memory in bytes. Only the used part takes memory.
SHM_BYTES = 16 << 30
# Paths of the caches in the container.
HUB_FOLDER = "/cache/hub"
DATASETS_FOLDER = "/cache/datasets"
# Keys of the stack file whose lists are replaced by the lists in the user's file. The lists of all
# other keys are extended.
_REPLACED_KEYS = ("command", "entrypoint")
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Stack:
    """Settings of a run from which the text of the stack file is generated.

    Attributes:
        name: the name of the stack, which is the name of the job.
        run_dir: the run directory, with the same path on all nodes.
        image: the name or id of the Docker image.
        nodes: the number of nodes.
        endpoint: the address HOST:PORT of the store at which the ranks meet.
        restarts: the maximum number of restarts of a node's ranks.
        user: the uid and gid of the processes in the container.
        cache: the folders on each node that are mounted at HUB_FOLDER and DATASETS_FOLDER.
        gpus: the name of the generic resource for GPUs, and the number of GPUs per node, or None.
        excluded: ids of the nodes of the swarm that are not used.
        mounts: pairs of a path on each node and a path in the container, for the files that the
            recipe reads.
        secrets: pairs of a file name in SECRETS and the name of a Docker secret.
        environment: names and values of further environment variables of the ranks.
        debug: whether ranks and NCCL write more details to the log.
    """

    name: str
    run_dir: str
    image: str
    nodes: int
    endpoint: str
    restarts: int
    user: tuple[int, int]
    cache: tuple[str, str]
    gpus: tuple[str, int] | None = None
    excluded: tuple[str, ...] = ()
    mounts: Pairs = ()
    secrets: Pairs = ()
    environment: Pairs = ()
    debug: bool = False

    def values(self) -> dict[str, object]:
        """Return the content of the stack file as nested dictionaries and lists."""
        return {
            "version": "3.8",
            "services": {SERVICE: self._service()},
            # Use the host's network, so that the ranks can use the fast link between the nodes.
            "networks": {"host": {"external": True, "name": "host"}},
            "secrets": {source: {"external": True, "name": name} for source, name in self.secrets},
        }

    def _service(self) -> dict[str, object]:
        words = agent_words(
            recipe_file(self.run_dir),
            debug=self.debug,
            # Exit with 0 after a stop request. Swarm would restart a run that exits with 75.
            stopped=0,
            nodes=self.nodes,
            endpoint=self.endpoint,
            id=self.name,
            restarts=self.restarts,
        )
        user, group = map(str, self.user)
        environment = {
            # Set HOME, because the user has no home folder in the image.
            "HOME": "/tmp",
            "HF_HUB_CACHE": HUB_FOLDER,
            "HF_DATASETS_CACHE": DATASETS_FOLDER,
            # Put the cache into the run directory, which is writable in every container.
            "TUNESMITH_CACHE": f"{self.run_dir}/launch/cache",
            "NVIDIA_MOFED": "enabled",
        }
        if "HF_TOKEN" in dict(self.secrets):
            environment["HF_TOKEN_PATH"] = f"{SECRETS}/HF_TOKEN"
        secrets = [
            # Set the owner, because the files of secrets belong to root by default.
            {"source": source, "target": source, "uid": user, "gid": group, "mode": 0o400}
            for source, _ in self.secrets
        ]
        return {
            "image": self.image,
            "command": ["python", *words],
            "user": f"{user}:{group}",
            "init": True,
            "working_dir": "/tmp",
            "stop_grace_period": f"{SECONDS_TO_SAVE}s",
            "environment": environment | dict(self.environment),
            "networks": ["host"],
            # Allow unlimited locked memory, because RDMA locks its buffers.
            "ulimits": {"memlock": -1, "stack": 64 << 20},
            "volumes": self._volumes(),
            "secrets": secrets,
            "labels": {JOB_LABEL: self.name},
            "deploy": self._deploy(),
        }

    def _volumes(self) -> list[dict[str, object]]:
        hub, datasets = self.cache
        binds = [
            (self.run_dir, self.run_dir, False),
            (hub, HUB_FOLDER, False),
            (datasets, DATASETS_FOLDER, False),
            *((place, path, True) for place, path in self.mounts),
        ]
        return [
            *(
                {"type": "bind", "source": place, "target": path, "read_only": read_only}
                for place, path, read_only in binds
            ),
            {"type": "tmpfs", "target": "/dev/shm", "tmpfs": {"size": SHM_BYTES}},
        ]

    def _deploy(self) -> dict[str, object]:
        restart_policy = {"condition": "on-failure", "delay": "5s", "max_attempts": self.restarts}
        # `max_attempts: 0` would mean an unlimited number of restarts.
        if not self.restarts:
            restart_policy = {"condition": "none"}
        deploy: dict[str, object] = {
            "mode": "replicated",
            "replicas": self.nodes,
            "placement": {
                # Without this limit, Swarm would place two agents on one node if another node is
                # not ready.
                "max_replicas_per_node": 1,
                "constraints": [f"node.id!={node}" for node in self.excluded],
            },
            "restart_policy": restart_policy,
            "labels": {JOB_LABEL: self.name},
        }
        if self.gpus:
            kind, count = self.gpus
            # Reserve the generic resource of the GPUs, which `doctor` checks on each node.
            spec = {"discrete_resource_spec": {"kind": kind, "value": count}}
            deploy["resources"] = {"reservations": {"generic_resources": [spec]}}
        return deploy

    def text(self, extra: Mapping[str, object] = {}) -> str:
        """Return the text of the stack file.

        The text is JSON, which is valid YAML and quotes every string.

        Args:
            extra: the content of the user's file, which is merged into the stack file.
        """
        # Escape "$" as "$$", because docker replaces `$NAME` by the value of a variable.
        values: Any = json.loads(json.dumps(self.values()).replace("$", "$$"))
        values = _merge(values, extra)
        # Objects without `external` come from the user's file. Add JOB_LABEL, so that they are
        # removed after the run too.
        for kind in ("networks", "secrets", "configs", "volumes"):
            for entry in values.get(kind, {}).values():
                if not entry.get("external"):
                    entry.setdefault("labels", {})[JOB_LABEL] = self.name
        return json.dumps(values, indent=1, ensure_ascii=False, default=str) + "\n"


def read_extra(file: Path) -> Mapping[str, object]:
    """Read a stack file of the user. Raise UsageError if it is not valid."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        values = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UsageError(
            "the file given with --stack-extra cannot be read",
            where=file,
            why=str(error).splitlines()[0],
            fix="make sure that the file is readable and valid YAML",
        ) from None
    if not isinstance(values, Mapping):
        raise UsageError(
            "the file given with --stack-extra is not a stack file: it is not a YAML mapping",
            where=file,
            fix="write a mapping, such as services: {ranks: {volumes: [...]}}",
        )
    for name, service in (values.get("services") or {}).items():
        if name != SERVICE and "image" not in service:
            raise UsageError(
                f"the service {name} has no image",
                where=f"{file}: services.{name}",
                fix=f"rename {name} to {SERVICE}, which is the run's, or add its image",
            )
    return values


def _merge(base: object, more: object, key: str = "") -> object:
    """Return `base` with the values of `more` merged into it recursively.

    Args:
        key: the key in the stack file to which `base` and `more` belong.
    """
    if isinstance(base, dict) and isinstance(more, Mapping):
        return base | {name: _merge(base.get(name), more[name], str(name)) for name in more}
    # Append the user's list to the generated list. A command is replaced instead, because its words
    # belong together.
    if isinstance(base, list) and isinstance(more, list) and key not in _REPLACED_KEYS:
        return [*base, *more]
    return more
