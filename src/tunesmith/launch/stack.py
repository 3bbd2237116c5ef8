"""The stack file of a run on a Docker swarm: one service, one task a node, whose ranks meet by themselves.

Swarm passes no devices to a container (moby/swarmkit#1244): with NVIDIA's runtime as the default one, NVIDIA_MOFED=enabled
asks it for /dev/infiniband. It ignores `ipc` and `shm_size`: shared memory is a tmpfs mount. No ssh server, no docker
socket, no folder with a token is in the container; it runs as the user who launched it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from tunesmith.errors import UsageError
from tunesmith.launch.inputs import SECRETS
from tunesmith.launch.jobs import agent_words, recipe_file, safe_value

LABEL = "tunesmith.job"  # on all that a launch makes: clean-up removes nothing else
SERVICE = "ranks"
SHM = 16 << 30  # bytes at most; what is not used takes no memory
GRACE = 3600  # seconds that the ranks have to save
HUB, DATASETS = "/cache/hub", "/cache/datasets"  # in the container
_REPLACED = ("command", "entrypoint")  # lists that an extra file replaces; it adds to others


@dataclass(frozen=True)
class Stack:
    """What a stack file is made of.

    `endpoint`: HOST:PORT that the ranks meet at. `gpus`: (kind, count) of the generic resource that each node has, or None.
    `excluded`: ids of the swarm's nodes that get no task. `mounts`: (place on each node, path in the container) of what the
    recipe reads. `secrets`: (file below SECRETS, the secret's name). `debug`: collect logs. `environment`: of the user.
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

    def values(self) -> dict[str, Any]:
        """The stack file's content."""
        flags = {
            "nodes": self.nodes,
            "endpoint": self.endpoint,
            "id": self.name,
            "restarts": self.restarts,
        }
        shared = [(self.run_dir, self.run_dir), *zip(self.cache, (HUB, DATASETS), strict=True)]
        user, group = map(str, self.user)
        service = {
            "image": self.image,
            "command": [
                "python",
                *agent_words(recipe_file(self.run_dir), debug=self.debug, stopped=0, **flags),
            ],
            "user": f"{user}:{group}",
            "init": True,
            "working_dir": "/tmp",
            "stop_grace_period": f"{GRACE}s",
            "environment": {
                "HOME": "/tmp",
                "HF_HUB_CACHE": HUB,
                "HF_DATASETS_CACHE": DATASETS,
                "TUNESMITH_CACHE": f"{self.run_dir}/launch/cache",
                "NVIDIA_MOFED": "enabled",
                "HF_TOKEN_PATH": f"{SECRETS}/HF_TOKEN",
                **dict(self.environment),
            },
            "networks": ["host"],
            "ulimits": {"memlock": -1, "stack": 64 << 20},
            "volumes": [
                *({"type": "bind", "source": place, "target": path} for place, path in shared),
                *(
                    {"type": "bind", "source": place, "target": path, "read_only": True}
                    for place, path in self.mounts
                ),
                {"type": "tmpfs", "target": "/dev/shm", "tmpfs": {"size": SHM}},
            ],
            "secrets": [
                {"source": s, "target": s, "uid": user, "gid": group, "mode": 0o400}
                for s, _ in self.secrets
            ],
            "labels": {LABEL: self.name},
            "deploy": self._deploy(),
        }
        return {
            "version": "3.8",
            "services": {SERVICE: service},
            "networks": {"host": {"external": True, "name": "host"}},
            "secrets": {source: {"external": True, "name": name} for source, name in self.secrets},
        }

    def _deploy(self) -> dict[str, Any]:
        again = {"condition": "on-failure", "delay": "5s", "max_attempts": self.restarts}
        specs = [
            {"discrete_resource_spec": {"kind": kind, "value": count}}
            for kind, count in filter(None, [self.gpus])
        ]
        return {
            "mode": "replicated",
            "replicas": self.nodes,
            "placement": {
                "max_replicas_per_node": 1,
                "constraints": [f"node.id!={node}" for node in self.excluded],
            },
            "restart_policy": again
            if self.restarts
            else {"condition": "none"},  # 0 attempts would be any number
            "labels": {LABEL: self.name},
            **({"resources": {"reservations": {"generic_resources": specs}}} if specs else {}),
        }

    def text(self, extra: Path | None = None) -> str:
        """The file; `extra` is a file of the user's whose content is laid over it. UsageError for a value with a line break."""
        from ruamel.yaml import YAML
        from ruamel.yaml.error import YAMLError

        values = _quoted(self.values())
        if extra is not None:
            try:
                more = YAML(typ="safe", pure=True).load(extra.read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, YAMLError) as error:
                why = str(error).splitlines()[0]
                raise UsageError(
                    "the extra file cannot be read", where=str(extra), why=why, fix="correct it"
                ) from None
            if not isinstance(more, Mapping):
                fix = "services: {ranks: {volumes: [...]}}"
                raise UsageError("the extra file is not a stack file", where=str(extra), fix=fix)
            values = _laid_over(values, more)
        for kind in ("networks", "secrets", "configs", "volumes"):
            for made in values.get(kind, {}).values():
                if not made.get("external"):
                    made.setdefault("labels", {})[LABEL] = self.name
        yaml, out = YAML(), StringIO()
        yaml.width = 1 << 20
        yaml.dump(values, out)
        return out.getvalue()


def _quoted(value: Any) -> Any:
    """The same with each text in quotes (docker reads YAML 1.1, where `on` is true), one line long, and `$` doubled, which
    docker would otherwise take for a variable."""
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    if isinstance(value, dict):
        return {key: _quoted(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_quoted(inner) for inner in value]
    if isinstance(value, str):
        return DoubleQuotedScalarString(safe_value(value, "stack file").replace("$", "$$"))
    return value


def _laid_over(base: Any, more: Any, key: str = "") -> Any:
    if isinstance(base, dict) and isinstance(more, Mapping):
        return {
            **base,
            **{name: _laid_over(base.get(name), value, str(name)) for name, value in more.items()},
        }
    if isinstance(base, list) and isinstance(more, list) and key not in _REPLACED:
        return [*base, *more]
    return more
