#!/bin/bash
#SBATCH --job-name=opcd-games
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=%x-%j.log
# Games: Frozen Lake with Qwen3-1.7B; OPCD_RECIPE=sokoban_qwen3_4b_1n8g for Sokoban.
#
#   sbatch slurm/opcd_games.sh context.path=FOLDER [key=value ...]   from the repository's root
#   OPCD_ACCOUNT=... slurm/opcd_games.sh (the same)   checks first, then submits itself
OPCD_RECIPE=${OPCD_RECIPE:-frozen_lake_qwen3_1p7b_1n8g}
OPCD_SCRIPT=$0
OPCD_ROOT=${OPCD_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd -P)}}
# shellcheck source=slurm/lib.sh
. "$OPCD_ROOT/slurm/lib.sh" || exit 2
opcd_main train "$@"
