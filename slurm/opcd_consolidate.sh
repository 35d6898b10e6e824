#!/bin/bash
#SBATCH --job-name=opcd-consolidate
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=%x-%j.log
# The experience into the weights: the training of the experience pipeline.
#
#   sbatch slurm/opcd_consolidate.sh task.train=FILE [key=value ...]   from the repository's root
#   OPCD_ACCOUNT=... slurm/opcd_consolidate.sh (the same)   checks first, then submits itself
OPCD_RECIPE=${OPCD_RECIPE:-math_qwen3_8b_2n8g}
OPCD_PIPELINE_STAGE=${OPCD_PIPELINE_STAGE:-consolidate}
OPCD_SCRIPT=$0
OPCD_ROOT=${OPCD_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd -P)}}
# shellcheck source=slurm/lib.sh
. "$OPCD_ROOT/slurm/lib.sh" || exit 2
opcd_main stage "$@"
