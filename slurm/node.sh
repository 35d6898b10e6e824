#!/bin/bash
# One node's part of an attempt, below srun: runs the command with this node's place, hands signals
# on (bash would die of them, or wait for its child first), and leaves the exit code for the job.
set -uo pipefail
export OPCD_NODE_RANK=$SLURM_NODEID
cd "$OPCD_ROOT" || exit 1
: >"$OPCD_HERE/started-$SLURM_NODEID"

# a server beside the ranks reads its weights from this node's memory. An attempt that was killed leaves
# a whole model there, whose lock nobody holds any more
memory=''
if [[ " $* " == *" engine.launch=true "* && " $* " != *" engine.folder="* ]]; then
  for old in /dev/shm/opcd-slurm-*/; do
    [[ ! -O $old ]] || flock -n "$old" rm -rf "$old"
  done
  memory=/dev/shm/opcd-slurm-$SLURM_JOB_ID
  mkdir -m 700 "$memory" && exec 9<"$memory" && flock 9 && set -- "$@" "engine.folder=$memory"
fi

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
[[ -z $memory ]] || rm -rf "$memory"
echo "$code" >"$OPCD_HERE/exit-$SLURM_NODEID"
exit "$code"
