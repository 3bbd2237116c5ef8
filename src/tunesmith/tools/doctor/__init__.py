"""Problems that a run would meet on a machine, a pair of nodes or a Slurm cluster, and fixes."""
