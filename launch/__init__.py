"""WHO submits: the launcher, the only importer of submitit. Until it stands, slurm/pretrain.sbatch starts a run."""
