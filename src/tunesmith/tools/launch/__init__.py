"""The commands `launch`, `status`, `logs` and `stop`.

`launch` starts runs on this machine, in a Docker container, on a Docker swarm or on a Slurm
cluster. The other commands show the state and the log of launched runs, and stop them.
"""

COMMANDS = {
    "train": {
        "launch local": ("tunesmith.tools.launch.cli_local", "train on the GPUs of this machine"),
        "launch docker": (
            "tunesmith.tools.launch.cli_docker",
            "train in a container on this machine",
        ),
        "launch swarm": (
            "tunesmith.tools.launch.cli_swarm",
            "train on a Docker swarm, such as two connected DGX Sparks",
        ),
        "launch slurm": ("tunesmith.tools.launch.cli_slurm", "train on nodes of a Slurm cluster"),
        "status": ("tunesmith.tools.launch.cli_status", "show the state of launched runs"),
        "logs": ("tunesmith.tools.launch.cli_logs", "show or follow the log of a launched run"),
        "stop": ("tunesmith.tools.launch.cli_stop", "make a launched run save and stop"),
    },
}
