#!/usr/bin/env bash
# COCO as in the paper: 16 GPUs, two images each, its learning rate.
#
#   sbatch [SLURM's options] launch/coco_16x2.sh [--config FILE] [key=value ...]
#
# Submit from the repository, in a folder that all nodes share. docs/slurm.md is the guide.
#SBATCH --job-name=tenfold-coco
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@300
. "${SLURM_SUBMIT_DIR:-.}/launch/job.sh"
run_job --config configs/coco_r50_deformable_two_stage.yaml train.global_batch=32 train.micro_batch=2 "$@"
