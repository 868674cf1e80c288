#!/bin/bash
# Every arm of every bin of a recipe as a SLURM job of its own, on a disk that all nodes see:
#
#     headstart prepare recipe.yaml --processes 16  # text in tokens, ahead, on a node without GPUs
#     headstart jobs recipe.yaml                    # lists the arms, one a line
#     sbatch --array=1-12 recipes/cluster/slurm.sh recipe.yaml    # as many as lines
#
# The same line goes on with what is not finished, and `headstart report RUN` shows what is.

#SBATCH --job-name=headstart
#SBATCH --nodes=1                    # of which one job takes all GPUs
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300            # before the end: a checkpoint is saved
#SBATCH --requeue                    # a preempted job starts again and goes on from its checkpoint

set -euo pipefail
recipe=$1

# The line of the list that is this job's, such as "--bin 1b --arm subnet+kd".
line=$(headstart jobs "$recipe" | sed -n "${SLURM_ARRAY_TASK_ID}p")
[ -n "$line" ] || { echo "the recipe has no job $SLURM_ARRAY_TASK_ID" >&2; exit 2; }
eval "part=($line)"                  # names with spaces are quoted

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240   # or torchrun kills a checkpoint after 30 seconds
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    torchrun --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" -m headstart.cli run "$recipe" "${part[@]}"
