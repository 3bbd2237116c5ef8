"""Problems that a run would meet on a machine, a pair of nodes or a Slurm cluster, and fixes."""

COMMANDS = {
    "machines": {
        "doctor": (
            "tunesmith.tools.doctor.cli",
            "check a machine, a pair or a cluster, and print fixes",
        ),
    },
}
