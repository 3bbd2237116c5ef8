"""Functions that run commands on other nodes and copy files and images to them, with the installed
ssh and rsync.

The other node needs sshd, rsync and docker. A file gets its final name only when it is complete.
Therefore, if a launch is interrupted, the next launch copies only the missing files.
"""

import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress

from tunesmith.errors import MachineError, UsageError
from tunesmith.host.child_output import last_line
from tunesmith.host.shell import shell_command, shell_word
from tunesmith.launch.rendezvous import local_addresses

SSH = [
    "ssh",
    "-T",
    "-oBatchMode=yes",
    "-oConnectTimeout=10",
    # Do not share a connection with other ssh processes. Do not forward an agent, X11 or ports.
    "-oControlPath=none",
    "-oForwardAgent=no",
    "-oForwardX11=no",
    "-oClearAllForwardings=yes",
    # Close a dead connection after 15 seconds.
    "-oServerAliveInterval=5",
    "-oServerAliveCountMax=3",
    "-oCompression=no",
    # Prefer the cipher AES-GCM, which processors support in hardware. Copies of large files took 25
    # % less CPU time with it.
    "-oCiphers=^aes128-gcm@openssh.com",
]
# Exit code of ssh if the connection failed, and exit code of a shell if a command does not exist.
SSH_FAILED = 255
NO_COMMAND = 127
IMAGE_ID = ("docker", "image", "inspect", "--format", "{{.Id}}")
# Line that is printed before the output of a command. Text before this line comes from the shell's
# start-up files and is removed.
_OUTPUT_BEGINS = "tunesmith: output begins"
_HOST = re.compile(r"(?!-)[\w.@:%\[\]-]+", re.ASCII)


def check_host(host: str, option: str) -> None:
    """Raise UsageError if `host` is not a host name. ssh would read a name that starts with "-" as
    an option.

    Args:
        option: the command-line option that gives the host, for the error message.
    """
    if not _HOST.fullmatch(host):
        raise UsageError(
            f"{host!r} is not a host name or address",
            where=option,
            fix=f"give a host name or an address that ssh accepts, such as {option} spark-b",
        )


def check_other_node(host: str, option: str) -> None:
    """Raise UsageError if `host` is not a host name, or if it is this node."""
    check_host(host, option)
    # The host may be a name that only ssh knows.
    with suppress(OSError):
        if socket.gethostbyname(host.rpartition("@")[2]) in local_addresses():
            raise UsageError(f"{host} is this node", where=option, fix="name another node")


def remote_words(host: str, words: Iterable[str]) -> list[str]:
    """Return a command line, as words, that runs a command on a host. The host "" is this node."""
    if not host:
        return list(words)
    check_host(host, "--hosts")
    return [*SSH, "--", host, shlex.join(words)]


def try_on(host: str, *words: str, text: str = "") -> "subprocess.CompletedProcess[str]":
    """Run a command on a host. Return the completed process, even if the command fails.

    Raise MachineError if the host cannot be reached.

    Args:
        host: the host, or "" for this node.
        text: the standard input of the command.
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
            raise MachineError(
                f"ssh cannot be started: {error.strerror}",
                fix="sudo apt-get install openssh-client",
            ) from None
        errors = f"{words[0]}: {error.strerror}"
        return subprocess.CompletedProcess(command, NO_COMMAND, "", errors)
    if host:
        # A command that itself exits with this code is reported in the same way.
        if done.returncode == SSH_FAILED:
            raise _unreached(host, done.stderr)
        done.stdout = done.stdout.partition(f"{_OUTPUT_BEGINS}\n")[2]
    return done


def run_on(host: str, *words: str, text: str = "") -> str:
    """Run a command on a host and return its output.

    Raise MachineError with the last line of its stderr if the command fails.
    """
    done = try_on(host, *words, text=text)
    if done.returncode:
        raise MachineError(
            f"{words[0]} failed on {host or 'this node'}",
            where=" ".join(words[:3]),
            why=last_line(done.stderr) or f"exit code {done.returncode}",
            fix="run `tunesmith doctor`, which checks the machine and shows a command for each "
            "fault",
        )
    return done.stdout


def send_files(paths: Iterable[str], host: str) -> None:
    """Copy files, links and folders to a host.

    Their paths on the host are the same as on this node.

    Raise MachineError if the host cannot be reached, has no rsync or has no disk space.
    """
    words = ["rsync", "-aR", "--no-implied-dirs", "--partial-dir=.rsync-partial"]
    # Skip files that another process is still downloading.
    words += ["--exclude=*.incomplete", "--exclude=*.lock"]
    if sys.stderr.isatty():
        words.append("--info=progress2")
    # Put an IPv6 address in brackets, because rsync separates host and path with a colon.
    place = f"[{host}]:/" if ":" in host else f"{host}:/"
    words += ["-e", shlex.join(SSH), "--", *dict.fromkeys(paths), place]
    try:
        # Write the progress to stderr (2), because stdout is for the result of the command.
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
            # Show the first line of rsync's errors, which has the cause. The last line has only the
            # exit status.
            why=errors.strip().partition("\n")[0][:300],
            fix="install rsync on both nodes with `sudo apt-get install rsync`; check the disk "
            f"(`df -h`) and the permissions (`ls -ld`) on {host}",
        )


def require_image(image: str) -> str:
    """Return the id of a Docker image on this node.

    Raise MachineError, with the command that builds the image, if it does not exist.
    """
    inspected = try_on("", *IMAGE_ID, image)
    if inspected.returncode:
        build = shell_command(["docker", "build", "-f", "docker/Dockerfile", "-t", image, "."])
        raise MachineError(
            f"this node has no Docker image {image}",
            where="--image",
            why=inspected.stderr.strip()[-300:],
            fix=f"run `{build}` in a clone of tunesmith, or name another image with --image",
        )
    return inspected.stdout.strip()


def send_image(image: str, image_id: str, host: str) -> None:
    """Copy a Docker image to a host, unless the host has an image with this id."""
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
                fix=f"check `ssh {shell_word(host)} docker ps`, and add the user of that host "
                "to the docker group",
            )
    # This command fails if the id of the loaded image is not `image_id`.
    run_on(host, "docker", "tag", image_id, image)


def _unreached(host: str, errors: str) -> MachineError:
    return MachineError(
        f"{host} cannot be reached by ssh",
        where=host,
        why=last_line(errors) or "the host closed the connection",
        fix=f"check `ssh {shell_word(host)} true`; "
        f"if this asks for a password, run `ssh-copy-id {shell_word(host)}`",
    )
