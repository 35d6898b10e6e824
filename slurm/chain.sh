#!/bin/bash
# The experience pipeline as jobs that wait for each other: extract, score, select, consolidate,
# evaluate; OPCD_STAGES="extract consolidate evaluate" names fewer (what is done is not done again).
#
#   OPCD_RECIPE=... slurm/chain.sh task.train=FILE [key=value ...]
#
# Every variable of README.md is passed on. A stage that fails for good ends the chain: those behind it are cancelled, and a
# small job writes which one it was to OPCD_OUTPUT/slurm/chain-<first job>.log.
set -uo pipefail
OPCD_OUTPUT=$(realpath -ms "${OPCD_OUTPUT:-$(dirname "$0")/../runs}")
export OPCD_OUTPUT
cd "$(dirname "$0")/.." || exit 1
stages=${OPCD_STAGES:-extract score select consolidate evaluate}
declare -A script=([extract]=extract [score]=extract [select]=extract
  [consolidate]=consolidate [evaluate]=evaluate)

for stage in $stages; do
  [[ -n ${script[$stage]:-} ]] || {
    echo "error: OPCD_STAGES=$stages: no stage $stage; allowed: extract, score, select," \
      "consolidate, evaluate" >&2
    exit 2
  }
done

jobs=() named=()
for stage in $stages; do
  job=$(OPCD_PIPELINE_STAGE=$stage OPCD_DEPENDENCY=${jobs[*]:+afterok:${jobs[-1]}} \
    "slurm/opcd_${script[$stage]}.sh" "$@")
  code=$?
  if ((code)); then
    [[ ${DRY_RUN:-0} == 1 || ${#jobs[@]} -eq 0 ]] || scancel "${jobs[@]}"
    exit "$code"
  fi
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    echo "# stage $stage"
    echo "$job"
    continue
  fi
  jobs+=("$job") named+=("$stage=$job")
  echo "$stage: job $job"
done
[[ ${DRY_RUN:-0} != 1 ]] || exit 0

# runs once any stage has failed, and is cancelled when none can fail any more
log=$OPCD_OUTPUT/slurm/chain-${jobs[0]}.log
mkdir -p "$(dirname "$log")"
printf -v failed 'afternotok:%s?' "${jobs[@]}"
read -ra flags <<<"${OPCD_SBATCH_FLAGS:-}"
sbatch --parsable "${flags[@]}" --output="$log" --dependency="${failed%\?}" --kill-on-invalid-dep=yes \
  ${OPCD_ACCOUNT:+"--account=$OPCD_ACCOUNT"} ${OPCD_PARTITION:+"--partition=$OPCD_PARTITION"} \
  slurm/chain_report.sh "${named[@]}" >/dev/null || {
  scancel "${jobs[@]}"
  echo "error: sbatch refuses the job that tells of a failed stage; the chain is cancelled;" \
    "allowed: OPCD_SBATCH_FLAGS that slurm/chain_report.sh may have" >&2
  exit 2
}
echo "a failed stage is told in $log"
