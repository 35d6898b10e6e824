#!/bin/bash
#SBATCH --job-name=opcd-math
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=%x-%j.log
# Cross-size maths: a Qwen3-8B teacher with the experience in its prompt, a Qwen3-4B student without.
#
#   sbatch slurm/opcd_math.sh task.train=FILE context.path=FOLDER [key=value ...]   from the repository's root
#   OPCD_ACCOUNT=... slurm/opcd_math.sh (the same)   checks first, then submits itself
OPCD_RECIPE=${OPCD_RECIPE:-math_qwen3_8b_to_4b_2n8g}
OPCD_SCRIPT=$0
OPCD_ROOT=${OPCD_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd -P)}}
# shellcheck source=slurm/lib.sh
. "$OPCD_ROOT/slurm/lib.sh" || exit 2
opcd_main train "$@"
