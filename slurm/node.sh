#!/bin/bash
# One node's part of an attempt, below srun: runs the command with this node's place, hands signals
# on (bash would die of them, or wait for its child first), and leaves the exit code for the job.
set -uo pipefail
export OPCD_NODE_RANK=$SLURM_NODEID
cd "$OPCD_ROOT" || exit 1
: >"$OPCD_HERE/started-$SLURM_NODEID"

"$@" &
child=$!
for name in USR1 USR2 TERM; do
  # shellcheck disable=SC2064
  trap "kill -$name $child 2>/dev/null" "$name"
done
while :; do
  wait "$child"
  code=$?
  kill -0 "$child" 2>/dev/null || break
done
wait "$child" 2>/dev/null
last=$?
((last == 127)) || code=$last
echo "$code" >"$OPCD_HERE/exit-$SLURM_NODEID"
exit "$code"
