#!/bin/bash
#SBATCH --job-name=opcd-extract
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=%x-%j.log
# Experience from problems solved: OPCD_PIPELINE_STAGE=extract, score or select.
#
#   sbatch slurm/opcd_extract.sh task.train=FILE [key=value ...]   from the repository's root
#   OPCD_ACCOUNT=... slurm/opcd_extract.sh (the same)   checks first, then submits itself
OPCD_RECIPE=${OPCD_RECIPE:-math_qwen3_8b_2n8g}
OPCD_PIPELINE_STAGE=${OPCD_PIPELINE_STAGE:-extract}
OPCD_SCRIPT=$0
OPCD_ROOT=${OPCD_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd -P)}}
# shellcheck source=slurm/lib.sh
. "$OPCD_ROOT/slurm/lib.sh" || exit 2
opcd_main stage "$@"
