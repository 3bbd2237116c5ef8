"""Problems of a machine, a pair of nodes or a Slurm cluster that a run would meet, and their fixes."""
