#!/bin/bash
# Every arm of every bin of a recipe as a SLURM job of its own, on a disk that all nodes see:
#
#     headstart jobs recipe.yaml                    # lists them, one a line
#     sbatch --array=1-9 recipes/cluster/slurm.sh recipe.yaml
#
# The same line goes on with what is not finished, and `headstart report RUN` shows what is.

#SBATCH --job-name=headstart
#SBATCH --nodes=1                    # of which one job takes all GPUs
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300            # five minutes before the end: a checkpoint is saved
#SBATCH --requeue                    # a preempted job starts again and goes on from its checkpoint

set -euo pipefail
recipe=$1

# The line of the list that is this job's, such as "--bin 1b --arm subnet+kd".
part=$(headstart jobs "$recipe" | sed -n "${SLURM_ARRAY_TASK_ID}p")

# Unquoted, since a part is several arguments.
# shellcheck disable=SC2086
srun torchrun --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" -m headstart.cli run "$recipe" $part
