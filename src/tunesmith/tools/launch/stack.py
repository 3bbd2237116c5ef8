"""The stack file of a run on a Docker swarm: one service of one task a node.

Swarm passes no devices to a container (moby/swarmkit#1244): with NVIDIA's runtime as the default
one, NVIDIA_MOFED=enabled asks it for /dev/infiniband. Swarm ignores `ipc` and `shm_size`: shared
memory is a tmpfs mount. No ssh server, no docker socket, no folder with a token is in the
container; it runs as the user who launched it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import UsageError
from tunesmith.launch.jobs import agent_words, recipe_file
from tunesmith.tools.launch.inputs import SECRETS

JOB_LABEL = "tunesmith.job"  # on all that a launch makes: clean-up removes nothing else
SERVICE = "ranks"
SHM_BYTES = 16 << 30  # bytes at most; what is not used takes no memory
SECONDS_TO_SAVE = 3600  # that the ranks have after a stop, before they are killed
# In the container
HUB_FOLDER = "/cache/hub"
DATASETS_FOLDER = "/cache/datasets"
# Lists that an extra file replaces; it adds to others.
_REPLACED_KEYS = ("command", "entrypoint")


@dataclass(frozen=True)
class Stack:
    """The content of a stack file.

    Attributes:
        endpoint: HOST:PORT that the ranks meet at.
        cache: the folders of HUB_FOLDER and DATASETS_FOLDER on each node.
        gpus: (kind, count) of the generic resource that each node has, or None.
        excluded: ids of the swarm's nodes that get no task.
        mounts: (place on each node, path in the container) of what the recipe reads.
        secrets: (file below SECRETS, the secret's name).
        environment: of the user.
        debug: ranks and NCCL say more in the log.
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
    mounts: tuple[tuple[str, str], ...] = ()
    secrets: tuple[tuple[str, str], ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    debug: bool = False

    def values(self) -> dict[str, object]:
        """The stack file's content."""
        return {
            "version": "3.8",
            "services": {SERVICE: self._service()},
            # The host's network: the ranks meet at addresses of the cable.
            "networks": {"host": {"external": True, "name": "host"}},
            "secrets": {source: {"external": True, "name": name} for source, name in self.secrets},
        }

    def _service(self) -> dict[str, object]:
        words = agent_words(
            recipe_file(self.run_dir),
            debug=self.debug,
            # Swarm would start a run again that was stopped and saved, which ends with 75.
            stopped=0,
            nodes=self.nodes,
            endpoint=self.endpoint,
            id=self.name,
            restarts=self.restarts,
        )
        user, group = map(str, self.user)
        environment = {
            # The user of the launch has no home folder in the image.
            "HOME": "/tmp",
            "HF_HUB_CACHE": HUB_FOLDER,
            "HF_DATASETS_CACHE": DATASETS_FOLDER,
            # The run directory is a folder that the container may write to on every node.
            "TUNESMITH_CACHE": f"{self.run_dir}/launch/cache",
            "NVIDIA_MOFED": "enabled",
        }
        if "HF_TOKEN" in dict(self.secrets):
            environment["HF_TOKEN_PATH"] = f"{SECRETS}/HF_TOKEN"
        secrets = [
            # Secrets are files of root unless the stack gives them to the user.
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
            # RDMA locks the memory of its buffers.
            "ulimits": {"memlock": -1, "stack": 64 << 20},
            "volumes": self._volumes(),
            "secrets": secrets,
            "labels": {JOB_LABEL: self.name},
            "deploy": self._deploy(),
        }

    def _volumes(self) -> list[dict[str, object]]:
        hub, datasets = self.cache
        volumes: list[dict[str, object]] = []
        for place, path in (
            (self.run_dir, self.run_dir),
            (hub, HUB_FOLDER),
            (datasets, DATASETS_FOLDER),
        ):
            volumes.append({"type": "bind", "source": place, "target": path})
        for place, path in self.mounts:
            volumes.append({"type": "bind", "source": place, "target": path, "read_only": True})
        volumes.append({"type": "tmpfs", "target": "/dev/shm", "tmpfs": {"size": SHM_BYTES}})
        return volumes

    def _deploy(self) -> dict[str, object]:
        # Swarm reads 0 attempts as any number of them.
        restart_policy: dict[str, object] = {"condition": "none"}
        if self.restarts:
            restart_policy = {
                "condition": "on-failure",
                "delay": "5s",
                "max_attempts": self.restarts,
            }
        deploy: dict[str, object] = {
            "mode": "replicated",
            "replicas": self.nodes,
            "placement": {
                # One agent a node; Swarm would place two on one where another is not ready.
                "max_replicas_per_node": 1,
                "constraints": [f"node.id!={node}" for node in self.excluded],
            },
            "restart_policy": restart_policy,
            "labels": {JOB_LABEL: self.name},
        }
        if self.gpus:
            kind, count = self.gpus
            # The generic resource that `doctor` looks at: each task gets its GPUs by it.
            spec = {"discrete_resource_spec": {"kind": kind, "value": count}}
            deploy["resources"] = {"reservations": {"generic_resources": [spec]}}
        return deploy

    def text(self, extra: Path | None = None) -> str:
        """The file, in JSON, which YAML has in it: each text is quoted, whatever it holds.

        extra: a file of the user's whose content is laid over it.
        """
        # docker takes `$NAME` for a variable, and `$$` for a dollar sign.
        values = json.loads(json.dumps(self.values()).replace("$", "$$"))
        if extra is not None:
            values = _laid_over(values, _read_extra(extra))
        # Only objects that the user's file adds have no `external`: they get our label for the
        # clean-up.
        for kind in ("networks", "secrets", "configs", "volumes"):
            for entry in values.get(kind, {}).values():
                if not entry.get("external"):
                    entry.setdefault("labels", {})[JOB_LABEL] = self.name
        return json.dumps(values, indent=1, ensure_ascii=False, default=str) + "\n"


def _read_extra(file: Path) -> Mapping[str, object]:
    """The content of a user's stack file; UsageError where it is none."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        values = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UsageError(
            "the extra file cannot be read",
            where=str(file),
            why=str(error).splitlines()[0],
            fix="correct it",
        ) from None
    if not isinstance(values, Mapping):
        fix = "services: {ranks: {volumes: [...]}}"
        raise UsageError("the extra file is not a stack file", where=str(file), fix=fix)
    return values


def _laid_over(base: object, more: object, key: str = "") -> object:
    """`base` with the keys of `more` merged into it; `key`: the one that both are the value of."""
    if isinstance(base, dict) and isinstance(more, Mapping):
        merged = dict(base)
        for name, value in more.items():
            merged[name] = _laid_over(base.get(name), value, str(name))
        return merged
    # A list of the user's file adds to ours; but a command is one whole.
    if isinstance(base, list) and isinstance(more, list) and key not in _REPLACED_KEYS:
        return [*base, *more]
    return more
