#!/usr/bin/env bash
# One node; anything from a configuration. The batch is the configuration's, the paper's by default: 32 images.
#
#   sbatch [SLURM's options] launch/single_node.sh --config FILE [key=value ...]
#
# Submit from the repository, in a folder that the node sees. With another number of GPUs: sbatch
# --ntasks-per-node=4 --gpus-per-node=4 launch/single_node.sh ... docs/slurm.md is the guide.
#SBATCH --job-name=tenfold
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@300
. "${SLURM_SUBMIT_DIR:-.}/launch/job.sh"
run_job "$@"
