#!/bin/bash
# Is this node fit for work? Prints `<node>: ok`, or what is wrong with it. Runs on the host, before
# any container: node_check.sh SHARED_FOLDER GPUS TIME_OF_THE_FIRST_NODE
set -uo pipefail
: "${OPCD_MIN_FREE_GIB:?}" "${OPCD_MAX_CLOCK_SKEW_S:?}"
shared=$1 gpus=$2 asked_at=$3
node=${SLURMD_NODENAME:-$(hostname)}

sick() {
  echo "$node: $*"
  exit 0
}

if ((gpus > 0)); then
  list=$(timeout 30 nvidia-smi -L 2>&1) || sick "nvidia-smi failed: ${list%%$'\n'*}"
  found=$(grep -c '^GPU ' <<<"$list")
  ((found >= gpus)) || sick "$found of $gpus GPUs"
  state=$(timeout 30 nvidia-smi --format=csv,noheader,nounits \
    --query-gpu=index,memory.used,ecc.errors.uncorrected.volatile.total,clocks_throttle_reasons.hw_slowdown) ||
    sick "nvidia-smi knows no state of the GPUs"
  while IFS=', ' read -r index used errors slowdown; do
    [[ ! $used =~ ^[0-9]+$ ]] || ((used < 2048)) || sick "GPU $index has $used MiB in use"
    [[ ! $errors =~ ^[0-9]+$ ]] || ((errors == 0)) || sick "GPU $index has $errors ECC errors"
    [[ $slowdown != Active ]] || sick "GPU $index is slowed down by its hardware"
  done <<<"$state"
fi

free_gib=$(awk '/^MemAvailable:/ {print int($2 / 1048576)}' /proc/meminfo)
((free_gib >= OPCD_MIN_FREE_GIB)) || sick "$free_gib GiB of free memory, OPCD_MIN_FREE_GIB=$OPCD_MIN_FREE_GIB"

# what is asked later is answered later: up to three minutes may lie between, never a negative time
skew=$(awk -v a="$asked_at" -v b="$EPOCHREALTIME" -v most="$OPCD_MAX_CLOCK_SKEW_S" \
  'BEGIN {d = b - a; if (d < -most || d > 180 + most) printf "%.0f", d}') || sick "awk failed"
[[ -z $skew ]] || sick "its clock is $skew s away from the first node's"

[[ -s $shared/canary ]] || sick "does not see $shared/canary: is the folder shared?"
{ echo "$EPOCHREALTIME" >"$shared/canary-$node"; } 2>/dev/null || sick "$shared: cannot be written"
echo "$node: ok"
