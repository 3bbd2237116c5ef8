"""What this machine offers: a cache folder, room on the disk, memory, a terminal; files written whole, and what is none."""

import os
import shutil
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from tunesmith.errors import MachineError, ModelError

# Where torchrun and accelerate, srun, Open MPI, and other MPIs say how many ranks there are. SLURM_NTASKS does not tell:
# a batch script without srun has it too, and is one process.
RANKS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
ABANDONED = 3 * 24 * 3600  # seconds; nothing is tokenised or converted for so long


def cache_folder(*parts: str) -> Path:
    """`parts` below `$TUNESMITH_CACHE`, else `$XDG_CACHE_HOME/tunesmith`, else `~/.cache/tunesmith`; not created."""
    own, base = os.environ.get("TUNESMITH_CACHE"), os.environ.get("XDG_CACHE_HOME")
    root = Path(own) if own else Path(base or "~/.cache") / "tunesmith"
    return root.expanduser().joinpath(*parts)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one move, so that a reader, a crash or a full disk leaves the old content or the new.

    Text is written as UTF-8, first to `.NAME.PID.partial`, so several processes may write at once. An OSError leaves
    the old file and no temporary one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def refuse_special_files(path: Path) -> None:
    """Raise ModelError where `path`, or what a folder of that name holds, is a pipe, a socket or a device.

    Opening or reading one may never end. Links, such as those of the Hub's cache, are followed.
    """
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    kinds |= dict.fromkeys((stat.S_IFCHR, stat.S_IFBLK), "a device")
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.exists() and (kind := kinds.get(stat.S_IFMT(file.stat().st_mode))):
            fix = "put the file itself there, or name another place"
            raise ModelError(f"{file.name} is {kind}, not a file", where=str(file), fix=fix)


def follow_umask(folder: Path) -> None:
    """Give every file below `folder` the mode that a new file gets there; safetensors writes its own with 600."""
    probe = folder / ".mode"  # the umask cannot be read without setting it, for all threads
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def from_here(path: str | Path) -> str:
    """A path below the working directory as a user there writes it; any other, and a Hub id, as it is."""
    return os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else str(path)


def remove_abandoned(cache: Path) -> None:
    """Delete the hidden folders of a cache that killed processes left behind: those made longer ago than ABANDONED."""
    for folder in cache.glob(".*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > ABANDONED:
                shutil.rmtree(folder)


def existing_folder(path: Path) -> Path:
    """The path itself or its nearest parent that is a folder: where what does not exist yet would be created."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def refuse_full_disk(path: Path, needed: int, *, what: str, fix: str, why: str = "") -> None:
    """Raise MachineError unless the disk of `path`, which need not exist yet, has `needed` bytes free for `what`."""
    from rich.filesize import decimal as size_text

    free = shutil.disk_usage(existing_folder(path)).free
    if needed > free:
        figures = (
            f"{size_text(needed)} needed, {size_text(free)} free, {size_text(needed - free)} short"
        )
        raise MachineError(
            f"no room on the disk for {what}: {figures}",
            where=str(path),
            why=why,
            fix=fix,
            cause="disk",
        )


def refuse_many_ranks(command: str) -> None:
    """Raise MachineError where this process is one of several that would each do all of `command` alone."""
    for name in RANKS:
        if (count := os.environ.get(name, "")).isdecimal() and int(count) > 1:
            what = f"this process is one of {count}, and cannot find the others"
            alone, several = (
                f"tunesmith {command} ...",
                f"torchrun --nproc-per-node N -m tunesmith {command} ...",
            )
            by = several if command in ("train", "sweep") else alone
            fix = f"{by}, without another launcher; unset {name} if it is left over"
            where, why = (
                f"environment: {name}={count}",
                "each of them would work alone, on all rows",
            )
            raise MachineError(what, where=where, why=why, fix=fix)


def oom_kills(root: Path = Path("/")) -> int:
    """Processes of this machine that the kernel has ended since it booted because no memory was left; /proc is below `root`."""
    with suppress(OSError, ValueError):
        lines = (root / "proc/vmstat").read_text(encoding="ascii").splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return 0


def physical_memory() -> int:
    """Bytes of host memory, in use or not."""
    import psutil

    return int(psutil.virtual_memory().total)


def available_cores(root: Path = Path("/")) -> int:
    """Cores that this process is bound to, within its control groups' share of time; /proc and /sys are below `root`."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(
        [cores, *(quota for group in control_groups("cpu", root) if (quota := _core_quota(group)))]
    )


def control_groups(controller: str, root: Path = Path("/"), process: str = "self") -> list[Path]:
    """The folders of a process's control groups of version 1 or 2 that may limit it, the innermost first."""
    found: list[Path] = []
    with suppress(OSError, ValueError):  # no control groups here
        for line in (root / "proc" / process / "cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, own = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            base = root / "sys/fs/cgroup" / controllers
            # In a container it may not be there, and its limit is that of `base`
            group = base / own.lstrip("/")
            found += [folder for folder in (group, *group.parents) if folder.is_relative_to(base)]
    return found


def _core_quota(group: Path) -> int | None:
    """Whole cores that a control group, of version 1 or 2, may use, at least 1; None where it has no limit."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # no such file, or `max`
            quota, period = map(
                int, " ".join((group / name).read_text(encoding="ascii") for name in names).split()
            )
            return max(1, quota // period) if quota > 0 else None
    return None


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` can draw a progress bar: what rich says, which knows TERM, FORCE_COLOR and TTY_COMPATIBLE."""
    from rich.console import Console

    return Console(file=stream).is_interactive
