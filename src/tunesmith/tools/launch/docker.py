"""`launch docker`: the ranks of this machine in a container.

It sees what the recipe reads and writes, each at its own path, and the caches of the Hub and of
tunesmith: nothing else of the user's files. Tokens reach it in files that are deleted as soon as it
runs; the container keeps what was mounted.
"""

import csv
import io
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tunesmith.config.schema import Run
from tunesmith.errors import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_STOPPED,
    MachineError,
    UsageError,
    mask,
)
from tunesmith.host.shell import shell_word
from tunesmith.host.signals import SIGNAL_NAMES
from tunesmith.launch.jobs import (
    Job,
    JobState,
    agent_words,
    name_of_run,
    recipe_file,
    safe_value,
    save_job,
    write_recipe,
)
from tunesmith.launch.ssh import NO_COMMAND, require_image, try_on
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
# Variables that mean the same in the container, and whose values `docker inspect` may show.
PASSED_TO_CONTAINER = re.compile(
    r"HF_HUB_OFFLINE|HF_ENDPOINT|(HTTPS?|NO)_PROXY|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS"
    r"|(NCCL|WANDB)_\w+",
    re.I,
)
LIMITS = (
    # A bound of /dev/shm, not an allocation: NCCL's buffers between ranks
    "--shm-size=16g",
    "--ulimit=memlock=-1",
    "--ulimit=stack=67108864",
    # `docker stop` waits until a large model is saved.
    "--stop-timeout=3600",
)
TOOLKIT = "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
# Words of docker -> what is wrong, and its fix
DOCKER_FAULTS = {
    "permission denied while trying": (
        "no permission to use Docker",
        "sudo usermod -aG docker $USER, then log in again",
    ),
    "Cannot connect to the Docker": ("Docker is not running", "sudo systemctl start docker"),
    "select device driver": (
        "Docker finds no GPU",
        f"install nvidia-container-toolkit, then: {TOOLKIT}",
    ),
}


class Mount(NamedTuple):
    """A path of this machine that the container sees at `target`, or at the same place."""

    path: Path
    writable: bool = False
    target: str = ""

    def text(self) -> str:
        """The value of docker's --mount: a line of CSV, so that a comma in a name stays there."""
        fields = ["type=bind", f"source={self.path}", f"target={self.target or self.path}"]
        if not self.writable:
            fields.append("readonly")
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(fields)
        return line.getvalue()


class DockerJob(Job):
    """A container of this machine's Docker, which has the job's name."""

    def container(self) -> JobState | None:
        """Ask Docker for the container's state; None where it has none of that name."""
        # Two words, so that one call answers both questions.
        form = "--format={{.State.Status}} {{.State.ExitCode}}"
        inspected = _docker("inspect", "--type=container", form, self.name, check=False)
        if inspected.returncode:
            return None
        status, code = inspected.stdout.split()
        if status in ("exited", "dead"):
            # Codes above 128 are of a signal.
            ending = RunState.FAILED if int(code) <= 128 else RunState.KILLED
            states = {EXIT_OK: RunState.FINISHED, EXIT_STOPPED: RunState.STOPPED}
            return JobState(states.get(int(code), ending), f"exit code {code}")
        # `docker create` was called and `docker start` was not yet.
        if status == "created":
            return JobState(RunState.QUEUED, "starts")
        # Before the first step the run directory has no lock: the container alone shows that it
        # runs.
        return JobState(RunState.RUNNING, "starts")

    def state(self) -> JobState:
        container = self.container()
        run = super().state()
        # Where both agree, the run directory says more.
        if container is None or container.state is run.state:
            return run
        if container.at_work:
            return container
        return run.after(container.state, container.text)

    def read_log(self, *, follow: bool) -> Iterator[str]:
        # The container is removed when somebody has waited for its end.
        if self.container() is None:
            yield from super().read_log(follow=False)
            return
        command = ["docker", "logs", f"--follow={str(follow).lower()}", self.name]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace"
        ) as logs:
            yield from logs.stdout or ()

    def stop(self) -> str:
        container = self.container()
        if container is None or container.state is not RunState.RUNNING:
            return super().stop()
        _docker("kill", "--signal=SIGTERM", self.name)
        return "stop requested: saves, then stops"


def _docker(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run docker; MachineError if it cannot be used, or if it fails and `check`."""
    process = try_on("", "docker", *words)
    if process.returncode == NO_COMMAND:
        fix = "sudo apt-get install docker.io"
        raise MachineError("docker is not installed", where="PATH", fix=fix)
    if process.returncode == 0:
        return process
    where = f"docker {words[0]}"
    why = mask(process.stderr.strip())[:600]
    for text, (what, fix) in DOCKER_FAULTS.items():
        if text in why:
            raise MachineError(what, where=where, why=why, fix=fix)
    if check:
        fix = "docker info shows how Docker is configured"
        raise MachineError(f"{where} failed", where=where, why=why, fix=fix)
    return process


def find_mounts(run: Run) -> list[Mount]:
    """List what the container sees of this machine.

    UsageError where that would show it keys, the Hub's token or Docker.
    """
    folders = [Path(folder) for folder in (run.output_dir, run.log.tensorboard_dir) if folder]
    mounts = [Mount(folder, writable=True) for folder in [*folders, *caches().values()]]
    inputs = recipe_inputs(run)
    # A snapshot of the Hub's cache is links to files beside it.
    # Mounting the snapshot alone would leave links that point nowhere in the container.
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
    """The words that `docker create` takes; UsageError for a value that cannot be an argument.

    The working directory is only a name in the container: what the run prints of paths starts from
    it, as here.
    """
    if not re.fullmatch(r"\w[\w.:/@-]*", image, re.ASCII):
        raise UsageError(
            f"{image!r} is not a valid image name", where="--image", fix="--image tunesmith"
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
    # A file may be readable for a group alone.
    words += [f"--group-add={group}" for group in os.getgroups() if group]
    if NVIDIA_DEVICE.exists():
        words.append("--gpus=all")
    words += [f"--mount={mount.text()}" for mount in mounts]
    paths = {**caches(), "HF_TOKEN_PATH": Path(SECRETS, "HF_TOKEN")}
    words += [f"--env={name}={path}" for name, path in paths.items()]
    # Docker takes the value from its own environment: it is on no command line.
    words += [f"--env={name}" for name in passed_variables(PASSED_TO_CONTAINER)]
    words += [image, "python", *agent_words(recipe_file(job.run_dir), debug=debug, ranks="auto")]
    return [safe_value(word, word.partition("=")[0]) for word in words]


def docker_job(run: Run) -> DockerJob:
    """The job of a run directory: Docker knows one container of a name."""
    return DockerJob(name_of_run("docker", os.path.realpath(run.output_dir)), run.output_dir)


def start_container(run: Run, image: str, *, debug: bool = False) -> DockerJob:
    """Start the run in a container that outlives this process.

    UsageError or MachineError before anything runs.
    """
    job = docker_job(run)
    mounts = find_mounts(run)
    # Wrong values end it here, before a file is written.
    create_words(job, image, mounts)
    previous = job.container()
    if previous is not None and previous.state is RunState.RUNNING:
        fix = f"tunesmith stop {shell_word(job.name)}, or another one: output_dir=runs/my-run"
        raise UsageError(
            "a container already trains in this run directory", where=job.name, fix=fix
        )
    # `docker create` would try to pull it from a registry.
    require_image(image)
    # The ended container of an earlier start still has the name.
    if previous is not None:
        _docker("rm", job.name)
    write_recipe(run)
    for mount in mounts:
        # Docker mounts only what is there.
        if mount.writable:
            mount.path.mkdir(parents=True, exist_ok=True)
    # The container keeps its mounts of these files after they are deleted; nothing stays on the
    # disk.
    # The folder's mode is 0700.
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        for name, value in find_secrets().items():
            secret = Path(folder, name)
            secret.touch(mode=0o600)
            secret.write_text(value, encoding="utf-8")
            mounts.append(Mount(secret, target=f"{SECRETS}/{name}"))
        _docker("create", *create_words(job, image, mounts, debug=debug))
        try:
            _docker("start", job.name)
        except BaseException:
            _docker("rm", "--force", job.name, check=False)
            raise
    save_job(job)
    return job


def follow_container(job: DockerJob) -> int:
    """Show what a container prints until it ends, and remove it -> its exit code.

    Stop signals go on to the container.
    """

    def forward(number: int, frame: object) -> None:
        _docker("kill", f"--signal={number}", job.name, check=False)

    for name in SIGNAL_NAMES:
        number = signal.Signals[name]
        # nohup ignores SIGHUP for its command, which stays so.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    # In a session of its own: ctrl-C comes to this process alone, and what the run prints while it
    # saves is still shown.
    subprocess.run(["docker", "logs", "--follow", job.name], start_new_session=True, check=False)
    # `docker wait` prints the exit code of the container, also of one that has ended.
    code = int(_docker("wait", job.name).stdout)
    _docker("rm", job.name)
    # 128 and a signal's number: the container was killed.
    return code if code < 128 else EXIT_FAILED
