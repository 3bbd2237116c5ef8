"""`launch docker`: start the ranks of a run on this machine in a Docker container.

The container only sees the paths that the recipe reads and writes, and the caches of the Hub and of
tunesmith. All paths are the same as on the host. Tokens are passed as mounted files, which are
deleted on the host when the container has started. The container can still read them.
"""

import csv
import io
import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from tunesmith.config.schema import Run
from tunesmith.errors import EXIT_FAILED, UsageError
from tunesmith.host.shell import shell_word
from tunesmith.host.signals import SIGNAL_NAMES
from tunesmith.launch.docker_job import DockerJob, run_docker
from tunesmith.launch.job import Job, save_job
from tunesmith.launch.jobs import agent_words, name_of_run, recipe_file, safe_value, write_recipe
from tunesmith.launch.ssh import require_image
from tunesmith.run_dir import RunState
from tunesmith.tools.launch.inputs import (
    SECRETS,
    caches,
    check_exposed,
    find_secrets,
    passed_variables,
    recipe_inputs,
)

NVIDIA_DEVICE = Path("/dev/nvidiactl")
DOCKER_SOCKET = "/var/run/docker.sock"
# Environment variables that are passed to the container: those that have the same meaning there.
# `passed_variables` leaves out secrets, because `docker inspect` would show their values.
PASSED_TO_CONTAINER = re.compile(
    r"HF_HUB_OFFLINE|HF_ENDPOINT|(HTTPS?|NO)_PROXY|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS"
    r"|(NCCL|WANDB)_\w+",
    re.I,
)
LIMITS = (
    # Maximum size of /dev/shm, in which NCCL exchanges data between ranks. Only the used part takes
    # memory.
    "--shm-size=16g",
    "--ulimit=memlock=-1",
    "--ulimit=stack=67108864",
    # Seconds that `docker stop` waits before it kills the container. The time is long enough to
    # save a large model.
    "--stop-timeout=3600",
)


class Mount(NamedTuple):
    """A path of the host that is mounted in the container.

    Attributes:
        path: the path on the host.
        writable: whether the container can write to it.
        target: the path in the container. "" means the same path as on the host.
    """

    path: Path
    writable: bool = False
    target: str = ""

    def text(self) -> str:
        """Return the value of docker's option --mount. In CSV format, paths may contain commas."""
        fields = ["type=bind", f"source={self.path}", f"target={self.target or self.path}"]
        if not self.writable:
            fields.append("readonly")
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(fields)
        return line.getvalue()


def find_mounts(run: Run) -> list[Mount]:
    """Return the mounts that the container needs.

    Raise UsageError if a mount would expose private keys, the Hub's token or the Docker socket.
    """
    folders = [Path(folder) for folder in (run.output_dir, run.log.tensorboard_dir) if folder]
    mounts = [Mount(folder, writable=True) for folder in [*folders, *caches().values()]]
    inputs = recipe_inputs(run)
    # Also mount the targets of symbolic links. For example, a snapshot in the Hub's cache consists
    # of links to files in another folder. Without the targets, the links would be broken in the
    # container.
    for folder in filter(Path.is_dir, list(inputs)):
        for link in filter(Path.is_symlink, folder.rglob("*")):
            inputs.append(Path(os.path.abspath(link.parent / link.readlink())))
    for path in dict.fromkeys(inputs):
        if not any(path.is_relative_to(mount.path) for mount in mounts):
            mounts.append(Mount(path))
    for mount in mounts:
        check_exposed(mount.path, system=(DOCKER_SOCKET,))
    return mounts


def create_words(job: Job, image: str, mounts: list[Mount], *, debug: bool = False) -> list[str]:
    """Return the arguments of `docker create`.

    The container has the same working directory as this process, so that the run prints the same
    relative paths. Raise UsageError if a value cannot be a command-line argument.
    """
    if not re.fullmatch(r"\w[\w.:/@-]*", image, re.ASCII):
        raise UsageError(
            f"{image!r} is not a valid image name",
            where="--image",
            fix="use a valid name, such as --image tunesmith",
        )
    words = [
        f"--name={job.name}",
        f"--label=tunesmith.run_dir={job.run_dir}",
        f"--workdir={os.getcwd()}",
        "--init",
        *LIMITS,
        "--security-opt=no-new-privileges",
        f"--user={os.getuid()}:{os.getgid()}",
    ]
    # Add the user's groups, because some files may be readable only for a group.
    words += [f"--group-add={group}" for group in os.getgroups() if group]
    if NVIDIA_DEVICE.exists():
        words.append("--gpus=all")
    words += [f"--mount={mount.text()}" for mount in mounts]
    paths = {**caches(), "HF_TOKEN_PATH": Path(SECRETS, "HF_TOKEN")}
    words += [f"--env={name}={path}" for name, path in paths.items()]
    # Pass only the names of the variables. Docker reads the values from its environment, so the
    # values are not visible in the command line.
    words += [f"--env={name}" for name in passed_variables(PASSED_TO_CONTAINER)]
    words += [image, "python", *agent_words(recipe_file(job.run_dir), debug=debug)]
    return [safe_value(word, word.partition("=")[0]) for word in words]


def docker_job(run: Run) -> DockerJob:
    """Return the job of a run. Its name is unique, because containers need unique names."""
    return DockerJob(name_of_run("docker", os.path.realpath(run.output_dir)), run.output_dir)


def start_container(run: Run, image: str, *, debug: bool = False) -> DockerJob:
    """Start the run in a container that keeps running after this process has ended.

    Raise UsageError or MachineError if the container cannot be started.
    """
    job = docker_job(run)
    mounts = find_mounts(run)
    # Build the arguments once to check all values before a file is written.
    create_words(job, image, mounts)
    previous = job.container()
    if previous is not None and previous.state is RunState.RUNNING:
        raise UsageError(
            "a container is already training in this run directory",
            where=job.name,
            fix=f"run `tunesmith stop {shell_word(job.name)}`, or use another output_dir",
        )
    # Check the image first, because `docker create` would try to pull it from a registry.
    require_image(image)
    # Remove the ended container of an earlier start, because it has the same name.
    if previous is not None:
        run_docker("rm", job.name)
    write_recipe(run)
    for mount in mounts:
        # Create the folder, because Docker only mounts paths that exist.
        if mount.writable:
            mount.path.mkdir(parents=True, exist_ok=True)
    # Write the secrets to a temporary folder, which has mode 0700. The container can still read the
    # mounted files after they are deleted from the disk.
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        for name, value in find_secrets().items():
            secret = Path(folder, name)
            secret.touch(mode=0o600)
            secret.write_text(value, encoding="utf-8")
            mounts.append(Mount(secret, target=f"{SECRETS}/{name}"))
        run_docker("create", *create_words(job, image, mounts, debug=debug))
        try:
            run_docker("start", job.name)
        except BaseException:
            run_docker("rm", "--force", job.name, check=False)
            raise
    save_job(job)
    return job


def follow_container(job: DockerJob) -> int:
    """Print the output of a container until it ends. Then remove it, and return its exit code.

    Stop signals are forwarded to the container.
    """

    def forward(number: int, frame: object) -> None:
        run_docker("kill", f"--signal={number}", job.name, check=False)

    for name in SIGNAL_NAMES:
        number = signal.Signals[name]
        # Keep ignoring a signal that the caller ignores: `nohup` ignores SIGHUP.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    # Start `docker logs` in a new session, so that ctrl-C only reaches this process. Otherwise
    # `docker logs` would end at ctrl-C and not print the output of the run while it saves.
    subprocess.run(["docker", "logs", "--follow", job.name], start_new_session=True, check=False)
    # `docker wait` prints the exit code of the container, even if it has already ended.
    code = int(run_docker("wait", job.name).stdout)
    run_docker("rm", job.name)
    # An exit code of 128 or more means that a signal has killed the container.
    return code if code < 128 else EXIT_FAILED
