"""Commands, files and images for other nodes: by ssh and rsync as they are installed.

The other node needs sshd, rsync and docker. A file gets its name there when it is whole; what a
launch that was cut off has sent is not sent again.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable

from tunesmith.errors import MachineError, UsageError
from tunesmith.host.child_output import last_line
from tunesmith.host.shell import shell_command, shell_word

SSH = [
    "ssh",
    "-T",
    "-oBatchMode=yes",
    "-oConnectTimeout=10",
    # No connection is shared or left open, and no agent or port goes along.
    "-oControlPath=none",
    "-oForwardAgent=no",
    "-oForwardX11=no",
    "-oClearAllForwardings=yes",
    # A dead link is closed after 15 seconds.
    "-oServerAliveInterval=5",
    "-oServerAliveCountMax=3",
    "-oCompression=no",
    # Processors have instructions for it: large files took a quarter less CPU time.
    "-oCiphers=^aes128-gcm@openssh.com",
]
# Exit codes
SSH_FAILED = 255
NO_COMMAND = 127
IMAGE_ID = ("docker", "image", "inspect", "--format", "{{.Id}}")
# Printed before the output of a command: the start-up files of a shell may print text of their own.
_OUTPUT_BEGINS = "tunesmith: output begins"
_HOST = re.compile(r"(?!-)[\w.@:%\[\]-]+", re.ASCII)


def check_host(host: str, option: str) -> None:
    """UsageError for what is no host: what begins with - would be an option of ssh."""
    if not _HOST.fullmatch(host):
        fix = f"{option} spark-b, or an address, as for ssh"
        raise UsageError(f"{host!r} is not a host", where=option, fix=fix)


def remote_words(host: str, words: Iterable[str]) -> list[str]:
    """The words that run a command on a host; "" is this node."""
    if not host:
        return list(words)
    check_host(host, "--hosts")
    return [*SSH, "--", host, shlex.join(words)]


def try_on(host: str, *words: str, text: str = "") -> "subprocess.CompletedProcess[str]":
    """Run a command on a host, with `text` as its input, whatever its exit code.

    MachineError where the host is not reached.
    """
    command = remote_words(host, words)
    if host:
        command[-1] = f"echo '{_OUTPUT_BEGINS}'; {command[-1]}"
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        if host:
            what = f"ssh cannot be started: {error.strerror}"
            raise MachineError(what, fix="sudo apt-get install openssh-client") from None
        text = f"{words[0]}: {error.strerror}"
        return subprocess.CompletedProcess(command, NO_COMMAND, "", text)
    if host and done.returncode == SSH_FAILED:
        raise _unreached(host, done.stderr)
    if host:
        done.stdout = done.stdout.partition(f"{_OUTPUT_BEGINS}\n")[2]
    return done


def run_on(host: str, *words: str, text: str = "") -> str:
    """Return what a command prints on a host; MachineError with its last complaint if it fails."""
    done = try_on(host, *words, text=text)
    if done.returncode:
        raise MachineError(
            f"{words[0]} failed on {host or 'this node'}",
            where=" ".join(words[:3]),
            why=last_line(done.stderr) or f"exit code {done.returncode}",
            fix="tunesmith doctor",
        )
    return done.stdout


def send_files(paths: Iterable[str], host: str) -> None:
    """Bring files, links and folders to a host, each to its own path.

    MachineError where the host is not reached, has no rsync, or its disk is full.
    """
    words = ["rsync", "-aR", "--no-implied-dirs", "--partial-dir=.rsync-partial"]
    # Another process is fetching these.
    words += ["--exclude=*.incomplete", "--exclude=*.lock"]
    if sys.stderr.isatty():
        words.append("--info=progress2")
    # rsync separates host and path by a colon.
    place = f"[{host}]:/" if ":" in host else f"{host}:/"
    words += ["-e", shlex.join(SSH), "--", *dict.fromkeys(paths), place]
    try:
        # Progress goes to stderr (2): stdout is for what a command answers.
        done = subprocess.run(words, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
        code, errors = done.returncode, done.stderr
    except FileNotFoundError as error:
        code, errors = NO_COMMAND, str(error)
    if code == SSH_FAILED:
        raise _unreached(host, errors)
    if code:
        raise MachineError(
            f"rsync to {host} failed",
            where="rsync",
            # The first line has the cause; the last one says where rsync's source gave up.
            why=errors.strip().partition("\n")[0][:300],
            fix=f"on both nodes: sudo apt-get install rsync; df -h and ls -ld there: "
            f"ssh {shell_word(host)}",
        )


def require_image(image: str) -> str:
    """The id of a docker image of this node.

    MachineError, with the command that builds it, if it is not here.
    """
    inspected = try_on("", *IMAGE_ID, image)
    if inspected.returncode:
        build = shell_command(["docker", "build", "-f", "docker/Dockerfile", "-t", image, "."])
        raise MachineError(
            f"there is no image {image} here",
            where="--image",
            why=inspected.stderr.strip()[-300:],
            fix=f"{build}, in a clone; or --image NAME",
        )
    return inspected.stdout.strip()


def send_image(image: str, image_id: str, host: str) -> None:
    """Bring a docker image of this node to a host that has none of its id."""
    if try_on(host, *IMAGE_ID, image_id).returncode:
        with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saved:
            load = remote_words(host, ["docker", "load"])
            loaded = subprocess.run(
                load, stdin=saved.stdout, capture_output=True, text=True, check=False
            )
        if saved.returncode or loaded.returncode:
            raise MachineError(
                f"the image cannot be copied to {host}",
                where="docker load",
                why=loaded.stderr.strip()[-300:],
                fix=f"ssh {shell_word(host)} docker ps: you must be in the docker group there",
            )
    # It fails where what was loaded has another id.
    run_on(host, "docker", "tag", image_id, image)


def _unreached(host: str, errors: str) -> MachineError:
    return MachineError(
        f"{host} cannot be reached by ssh",
        where=host,
        why=last_line(errors) or "it closed the connection",
        fix=f"ssh {shell_word(host)} true; "
        f"if it asks for a password: ssh-copy-id {shell_word(host)}",
    )
