#!/bin/bash
# A recipe on all GPUs of several hosts: sbatch docs/examples/slurm.sh recipes/llama2-awq.yaml
#SBATCH --job-name=compress
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=TERM@120
#SBATCH --requeue

# Two minutes before the time limit ranks get SIGTERM and stop after the current unit; the requeued
# job, or the same command, continues.
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node=auto --max-restarts=0 \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first:29500" \
    -m compressor run "$@"
