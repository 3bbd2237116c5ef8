"""What stands in the way of a run on this machine, on a pair of nodes or on a Slurm cluster, and what mends it."""
