#!/bin/bash
#SBATCH --job-name=opcd-prompt
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=%x-%j.log
# System prompts: the medical prompt into Qwen2.5-7B; OPCD_RECIPE names another model, or safety.
#
#   sbatch slurm/opcd_system_prompt.sh task.train=FILE task.test=FILE [key=value ...]   from the repository's root
#   OPCD_ACCOUNT=... slurm/opcd_system_prompt.sh (the same)   checks first, then submits itself
OPCD_RECIPE=${OPCD_RECIPE:-medical_qwen2p5_7b_1n8g}
OPCD_SCRIPT=$0
OPCD_ROOT=${OPCD_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd -P)}}
# shellcheck source=slurm/lib.sh
. "$OPCD_ROOT/slurm/lib.sh" || exit 2
opcd_main train "$@"
