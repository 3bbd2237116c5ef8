"""The command `doctor`.

It checks a machine, a pair of nodes or a Slurm cluster, and reports problems that would make a run
fail.
"""

COMMANDS = {
    "machines": {
        "doctor": (
            "tunesmith.tools.doctor.cli",
            "check a machine, a pair or a cluster, and print fixes",
        ),
    },
}
