#!/usr/bin/env bash
# COCO on 64 GPUs: 8 nodes of 8, two images each.
#
#   sbatch [SLURM's options] launch/coco_64gpu.sh [--config FILE] [key=value ...]
#
# Submit from the repository, in a folder that all nodes share. docs/slurm.md is the guide.
# 128 images a step are four times the paper's: its learning rate is doubled (the square root of 4, as for Adam), and
# reached in 1000 steps. This rule is stated, not proven: launch/coco_16x2.sh is the paper's batch.
#SBATCH --job-name=tenfold-coco
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@300
. "${SLURM_SUBMIT_DIR:-.}/launch/job.sh"
run_job --config configs/coco_r50_deformable_two_stage.yaml train.global_batch=128 train.micro_batch=2 \
  optim.lr_scaling=sqrt optim.warmup_steps=1000 "$@"
