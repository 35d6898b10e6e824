#!/bin/bash
#SBATCH --job-name=opcd-chain
#SBATCH --ntasks=1
#SBATCH --time=5
# Says which stage of a chain failed: chain_report.sh STAGE=JOB... (submitted by chain.sh).
set -uo pipefail
failed=
for one in "$@"; do
  state=$(scontrol show job "${one#*=}" -o | grep -oE 'JobState=[A-Z_]+' | cut -d= -f2)
  if [[ $failed ]]; then
    echo "chain: ${one%=*} (job ${one#*=}) does not run: $state"
  elif [[ $state != COMPLETED ]]; then
    failed=$one
    echo "chain: stage ${one%=*} (job ${one#*=}) failed: $state; the chain stops"
  fi
done
