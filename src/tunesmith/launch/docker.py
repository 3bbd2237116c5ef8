"""`launch docker`: the ranks of this machine in a container.

It sees what the recipe reads and writes, each at its own path, and the caches of the Hub and of tunesmith: nothing else of
the user's files. Tokens reach it in files that are deleted as soon as it runs; the container keeps what was mounted.
"""

import csv
import io
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tunesmith.config.schema import Run
from tunesmith.errors import EXIT_FAILED, MachineError, UsageError, is_secret_name, mask
from tunesmith.host.shell import shell_word
from tunesmith.host.signals import NAMES
from tunesmith.launch.inputs import SECRETS, caches, find_secrets, recipe_inputs
from tunesmith.launch.jobs import (
    Job,
    State,
    agent_words,
    name_of_run,
    recipe_file,
    safe_value,
    save_job,
    write_recipe,
)

GPU = Path("/dev/nvidiactl")
# Variables that mean the same in the container, and whose values `docker inspect` may show.
PASSED = re.compile(
    r"HF_HUB_OFFLINE|HF_ENDPOINT|(HTTPS?|NO)_PROXY|CUDA_VISIBLE_DEVICES|OMP_NUM_THREADS|(NCCL|WANDB)_\w+",
    re.I,
)
# /dev/shm is a bound, not an allocation: NCCL's buffers between ranks. `docker stop` waits until a large model is saved.
LIMITS = ("--shm-size=16g", "--ulimit=memlock=-1", "--ulimit=stack=67108864", "--stop-timeout=3600")
TOOLKIT = "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
FAULTS = {  # words of docker -> what is wrong, and its fix
    "permission denied while trying": (
        "you may not use Docker",
        "sudo usermod -aG docker $USER, then log in again",
    ),
    "Cannot connect to the Docker": ("Docker does not run", "sudo systemctl start docker"),
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
        """The value of docker's --mount, which is a line of CSV: a comma in a name stays in the name."""
        fields = ["type=bind", f"source={self.path}", f"target={self.target or self.path}"]
        line = io.StringIO()
        csv.writer(line, lineterminator="").writerow(
            fields if self.writable else [*fields, "readonly"]
        )
        return line.getvalue()


class DockerJob(Job):
    """A container of this machine's Docker, which has the job's name."""

    def container(self) -> State | None:
        """What Docker says of it; None where it has none of that name."""
        form = "--format={{.State.Status}} {{.State.ExitCode}}"
        found = _docker("inspect", "--type=container", form, self.name, check=False)
        if found.returncode:
            return None
        status, code = found.stdout.split()
        if status in ("exited", "dead"):
            return State("ended", f"exit code {code}")
        return State("waiting" if status == "created" else "running", "starts")

    def state(self) -> State:
        container, run = self.container(), super().state()
        return run if container is None or container.phase == run.phase else container

    def read_log(self, *, follow: bool) -> Iterator[str]:
        if self.container() is None:
            yield from super().read_log(follow=False)
            return
        command = ["docker", "logs", f"--follow={str(follow).lower()}", self.name]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace"
        ) as logs:
            yield from logs.stdout or ()

    def stop(self, say: Callable[[str], None] = lambda text: None) -> str:
        if (container := self.container()) is None or container.phase != "running":
            return super().stop(say)
        _docker("kill", "--signal=SIGTERM", self.name)
        return "asked to save and end"


def _docker(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run docker; MachineError if it cannot be used, or if it fails and `check`."""
    try:
        done = subprocess.run(
            ["docker", *words], capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError:
        raise MachineError(
            "docker is not installed", where="PATH", fix="sudo apt-get install docker.io"
        ) from None
    why = mask(done.stderr.strip())[:600]
    known = [fault for said, fault in FAULTS.items() if said in why]
    if done.returncode and (known or check):
        what, fix = (
            known[0]
            if known
            else (f"docker {words[0]} failed", "docker info says how Docker is set up")
        )
        raise MachineError(what, where=f"docker {words[0]}", why=why, fix=fix)
    return done


def find_mounts(run: Run) -> list[Mount]:
    """What the container sees of this machine; UsageError where that would show it keys, the Hub's token or Docker."""
    from huggingface_hub import constants

    folders = [Path(folder) for folder in (run.output_dir, run.log.tensorboard_dir) if folder]
    mounts = [Mount(folder, writable=True) for folder in [*folders, *caches().values()]]
    inputs = recipe_inputs(run)
    # Links out of it, as a snapshot of the Hub's cache has them
    for folder in filter(Path.is_dir, list(inputs)):
        links = filter(Path.is_symlink, folder.rglob("*"))
        inputs += [Path(os.path.abspath(link.parent / link.readlink())) for link in links]
    for path in dict.fromkeys(inputs):
        if not any(path.is_relative_to(mount.path) for mount in mounts):
            mounts.append(Mount(path))
    private = [
        Path("~/.ssh").expanduser(),
        Path(constants.HF_TOKEN_PATH),
        Path("/var/run/docker.sock"),
    ]
    for path in (mount.path.resolve() for mount in mounts):
        if shown := [hidden for hidden in private if hidden.resolve().is_relative_to(path)]:
            what, why = (
                f"the container would see {shown[0]}",
                "a folder is mounted with all that is in it",
            )
            raise UsageError(
                what, where=str(path), why=why, fix="name a folder that does not hold it"
            )
    return mounts


def create_words(job: Job, image: str, mounts: list[Mount], *, debug: bool = False) -> list[str]:
    """The words that `docker create` takes, each one argument; UsageError for a value that cannot be one.

    The working directory is only a name there: what the run tells of paths starts from it, as here.
    """
    if not re.fullmatch(r"\w[\w.:/@-]*", image, re.ASCII):
        raise UsageError(
            f"{image!r} is not the name of an image", where="--image", fix="--image tunesmith"
        )
    words = [
        f"--name={job.name}",
        f"--label=tunesmith.run_dir={job.run_dir}",
        f"--workdir={os.getcwd()}",
        "--init",
    ]
    words += [*LIMITS, "--security-opt=no-new-privileges", f"--user={os.getuid()}:{os.getgid()}"]
    # A group alone may read a file
    words += [f"--group-add={group}" for group in os.getgroups() if group]
    words += ["--gpus=all"] if GPU.exists() else []
    words += [f"--mount={mount.text()}" for mount in mounts]
    paths = {**caches(), "HF_TOKEN_PATH": Path(SECRETS, "HF_TOKEN")}
    words += [f"--env={name}={path}" for name, path in paths.items()]
    named = {
        name: value
        for name, value in os.environ.items()
        if PASSED.fullmatch(name) and not is_secret_name(name)
    }
    words += [f"--env={name}" for name, value in sorted(named.items()) if mask(value) == value]
    words += [image, "python", *agent_words(recipe_file(job.run_dir), debug=debug, ranks="auto")]
    return [safe_value(word, word.partition("=")[0]) for word in words]


def docker_job(run: Run) -> DockerJob:
    """The job of a run directory: Docker knows one container of a name."""
    return DockerJob(name_of_run("docker", os.path.realpath(run.output_dir)), run.output_dir)


@contextmanager
def _secret_files() -> Iterator[list[Mount]]:
    """What `find_secrets` has, in files that only this user can read, gone when the block ends."""
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:  # 0700
        files = {Path(folder, name): value for name, value in find_secrets().items()}
        for file, value in files.items():
            file.touch(mode=0o600)
            file.write_text(value, encoding="utf-8")
        yield [Mount(file, target=f"{SECRETS}/{file.name}") for file in files]


def start_container(run: Run, image: str, *, debug: bool = False) -> DockerJob:
    """Start the run in a container that outlives this process. UsageError or MachineError before anything runs."""
    job, mounts = docker_job(run), find_mounts(run)
    create_words(job, image, mounts)
    if (before := job.container()) is not None and before.phase == "running":
        fix = f"tunesmith stop {shell_word(job.name)}, or another one: output_dir=runs/my-run"
        raise UsageError(
            "a container trains in this run directory already", where=job.name, fix=fix
        )
    if _docker("image", "inspect", image, check=False).returncode:
        fix = f"in a clone: docker build -f docker/Dockerfile -t {shell_word(image)} . (see docs/docker.md)"
        raise MachineError(
            f"there is no image {image} on this machine", where="docker image inspect", fix=fix
        )
    write_recipe(run)
    for mount in mounts:
        if mount.writable:
            mount.path.mkdir(parents=True, exist_ok=True)
    if before is not None:
        _docker("rm", job.name)
    with _secret_files() as secrets:
        _docker("create", *create_words(job, image, [*mounts, *secrets], debug=debug))
        try:
            _docker("start", job.name)
        except BaseException:
            _docker("rm", "--force", job.name, check=False)
            raise
    save_job(job)
    return job


def follow_container(job: DockerJob) -> int:
    """Show what a container says until it ends, hand stop signals on to it, and remove it -> its exit code."""
    for number in map(signal.Signals.__getitem__, NAMES):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(
                number, lambda got, _: _docker("kill", f"--signal={got}", job.name, check=False)
            )
    # In a session of its own: ctrl-C comes to this process, and what the run says while it saves is still shown.
    subprocess.run(["docker", "logs", "--follow", job.name], start_new_session=True, check=False)
    code = int(_docker("wait", job.name).stdout)
    _docker("rm", job.name)
    return code if code < 128 else EXIT_FAILED
