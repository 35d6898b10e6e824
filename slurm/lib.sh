# shellcheck shell=bash
# What the scripts of this folder share; sourced by them. README.md says which variables they read.
#
#   opcd_main KIND ARGUMENT...   the whole of a script: KIND is `train`, or `stage` of the experience
#                                pipeline; the arguments are the command's, key=value
#
# Started by hand a script checks everything and submits itself; started by sbatch it is the job.
set -uo pipefail

EXIT_BAD_INPUT=2
EXIT_STOPPED=75        # by a signal, with a checkpoint (opcd_nemo/launch/exits.py)
EXIT_DO_NOT_RESTART=93 # by the file STOP, a sick node without a spare, or too many restarts

# NCCL and GLOO: what the site or the user has set wins
export NCCL_DEBUG=${NCCL_DEBUG-WARN}
export TORCH_NCCL_AVOID_RECORD_STREAMS=${TORCH_NCCL_AVOID_RECORD_STREAMS-1}
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL-ERROR} # c10d warns of every name it cannot look up
export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER-1} # a crash prints the stacks

opcd_say() { printf '[%(%F %T)T] attempt %s: %s\n' -1 "${attempt:-0}" "$*"; }

opcd_refuse() {
  printf 'error: %s\n' "$*" >&2
  exit "$EXIT_BAD_INPUT"
}

# the value of the script's own line `#SBATCH --NAME=VALUE`
opcd_directive() { sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$OPCD_SCRIPT" | tail -n 1; }

opcd_check_number() { # NAME VALUE
  [[ $2 =~ ^[0-9]+$ ]] || opcd_refuse "$1=$2: allowed: a whole number"
}

# --- settings ---------------------------------------------------------------------------------

opcd_settings() {
  if [[ -n ${OPCD_SITE:-} ]]; then # modules, interfaces, NCCL_*: one file for the site
    [[ -r $OPCD_SITE ]] || opcd_refuse "OPCD_SITE=$OPCD_SITE: not there; allowed: a file to source"
    set -a # what it sets is for the job too
    # shellcheck disable=SC1090
    . "$OPCD_SITE"
    set +a
  fi
  OPCD_OUTPUT=$(realpath -ms "${OPCD_OUTPUT:-$OPCD_ROOT/runs}") # not every command runs here
  OPCD_NAME=${OPCD_NAME:-$OPCD_RECIPE}
  OPCD_SPARE_NODES=${OPCD_SPARE_NODES:-0}
  if [[ -n ${SLURM_JOB_ID:-} ]]; then # what was allocated counts
    gpus=${SLURM_GPUS_PER_NODE:-0}
    nodes=${OPCD_NODES:-$((SLURM_JOB_NUM_NODES - OPCD_SPARE_NODES))}
  else
    gpus=${OPCD_GPUS_PER_NODE:-$(opcd_directive gpus-per-node)}
    nodes=${OPCD_NODES:-$(opcd_directive nodes)}
  fi
  gpus=${gpus##*:} # a count may follow a type: h100:8
  engine_gpus=${OPCD_ENGINE_GPUS_PER_NODE:-0}
  opcd_check_number OPCD_ENGINE_GPUS_PER_NODE "$engine_gpus"
  ((engine_gpus == 0 || engine_gpus < gpus)) || opcd_refuse "OPCD_ENGINE_GPUS_PER_NODE=$engine_gpus:" \
    "allowed: fewer than the $gpus GPUs of a node; 0: ranks sample"
  ranks=${OPCD_RANKS_PER_NODE:-$((gpus - engine_gpus))}
  OPCD_MAX_RESTARTS=${OPCD_MAX_RESTARTS:-10}
  OPCD_HEARTBEAT_TIMEOUT_S=${OPCD_HEARTBEAT_TIMEOUT_S:-3600}
  OPCD_REQUEUE_AFTER_S=${OPCD_REQUEUE_AFTER_S:-120}
  OPCD_REHEARSE=${OPCD_REHEARSE:-0}
  OPCD_MIN_FREE_GIB=${OPCD_MIN_FREE_GIB:-8}
  OPCD_MAX_CLOCK_SKEW_S=${OPCD_MAX_CLOCK_SKEW_S:-5}
  OPCD_PROBE_MIB=${OPCD_PROBE_MIB:-256}
  OPCD_PROBE_TIMEOUT_S=${OPCD_PROBE_TIMEOUT_S:-60}
  OPCD_MIN_GBPS=${OPCD_MIN_GBPS:-$([[ $gpus == 0 ]] && echo 0.02 || echo 20)}
  OPCD_MOUNTS=${OPCD_MOUNTS:-}
  OPCD_IMAGE=${OPCD_IMAGE:-}
  if [[ -n $OPCD_IMAGE ]]; then OPCD_PYTHON=${OPCD_PYTHON:-python}; fi
  OPCD_PYTHON=${OPCD_PYTHON:-$OPCD_ROOT/.venv/bin/python}
  local name
  for name in OPCD_SPARE_NODES OPCD_MAX_RESTARTS OPCD_HEARTBEAT_TIMEOUT_S OPCD_REQUEUE_AFTER_S \
    OPCD_MIN_FREE_GIB OPCD_MAX_CLOCK_SKEW_S OPCD_PROBE_MIB OPCD_PROBE_TIMEOUT_S; do
    opcd_check_number "$name" "${!name}"
  done
  [[ $OPCD_MIN_GBPS =~ ^[0-9]+(\.[0-9]+)?$ ]] || opcd_refuse "OPCD_MIN_GBPS=$OPCD_MIN_GBPS:" \
    "allowed: a number, as 20 or 0.5"
  [[ $OPCD_REHEARSE == 0 || ${DRY_RUN:-0} == 1 ]] || opcd_refuse "OPCD_REHEARSE=$OPCD_REHEARSE:" \
    "allowed: 0, or 1 with DRY_RUN=1"
  opcd_check_number OPCD_NODES "$nodes"
  opcd_check_number OPCD_GPUS_PER_NODE "$gpus"
  opcd_check_number OPCD_RANKS_PER_NODE "$ranks"
  export OPCD_ROOT OPCD_OUTPUT OPCD_MIN_FREE_GIB OPCD_MAX_CLOCK_SKEW_S OPCD_MIN_GBPS OPCD_PROBE_MIB
  export OPCD_PROBE_TIMEOUT_S
  export PYTHONPATH=$OPCD_ROOT:$OPCD_ROOT/kernels${PYTHONPATH:+:$PYTHONPATH}
}

# --- bad input: one line, before anything is queued and again in the first second of the job ---

opcd_check() {
  ((nodes >= 1)) || opcd_refuse "OPCD_NODES=$nodes: allowed: 1 or more, and OPCD_SPARE_NODES beside"
  ((ranks >= 1)) || opcd_refuse "OPCD_RANKS_PER_NODE=$ranks: allowed: 1 or more where nodes have" \
    "no GPUs"
  ((gpus == 0 || ranks <= gpus - engine_gpus)) || opcd_refuse "OPCD_RANKS_PER_NODE=$ranks: allowed:" \
    "at most $((gpus - engine_gpus)) of the $gpus GPUs of a node"
  opcd_check_recipe
  opcd_check_image
  opcd_check_mounts
  opcd_check_output
}

opcd_check_recipe() {
  [[ -f $OPCD_ROOT/conf/recipe/$OPCD_RECIPE.yaml ]] && return
  local names
  names=$(cd "$OPCD_ROOT/conf/recipe" && printf '%s, ' *.yaml)
  names=${names//.yaml/}
  opcd_refuse "OPCD_RECIPE=$OPCD_RECIPE: no such file in conf/recipe; allowed: ${names%, }"
}

opcd_check_image() {
  if [[ -z $OPCD_IMAGE ]]; then
    command -v "$OPCD_PYTHON" >/dev/null || opcd_refuse "OPCD_PYTHON=$OPCD_PYTHON: not there;" \
      "allowed: a Python with the project installed, or OPCD_IMAGE"
    return
  fi
  case $OPCD_IMAGE in # a reference is for the registry to know
    *'#'* | *://*) ;;
    /* | ./* | ../* | *.sqsh)
      [[ -r $OPCD_IMAGE ]] || opcd_refuse "OPCD_IMAGE=$OPCD_IMAGE: not there;" \
        "allowed: a file or folder, or registry#name:tag"
      OPCD_IMAGE=$(realpath -s "$OPCD_IMAGE") ;; # pyxis takes img/x.sqsh for a name in a registry
  esac
  ! command -v srun >/dev/null || srun --help 2>/dev/null | grep -e --container-image >/dev/null ||
    opcd_refuse \
    "OPCD_IMAGE=$OPCD_IMAGE: srun has no --container-image; allowed: with pyxis, or no image and" \
    "OPCD_PYTHON"
}

opcd_check_mounts() {
  local mount source
  [[ -z $OPCD_MOUNTS || -n $OPCD_IMAGE ]] || opcd_refuse "OPCD_MOUNTS=$OPCD_MOUNTS: allowed: with" \
    "OPCD_IMAGE"
  for mount in ${OPCD_MOUNTS//,/ }; do
    source=${mount%%:*}
    [[ $source == /* ]] || opcd_refuse "OPCD_MOUNTS=$mount: allowed: /source[:/target[:ro]], ..."
    [[ -e $source ]] || opcd_refuse "OPCD_MOUNTS=$mount: $source is not there; allowed: a folder" \
      "that every node has"
  done
}

opcd_check_output() {
  local probe=$OPCD_OUTPUT/.writable.$$
  if ! { mkdir -p "$OPCD_OUTPUT" && : >"$probe"; } 2>/dev/null; then
    opcd_refuse "OPCD_OUTPUT=$OPCD_OUTPUT: $(hostname) cannot write there; allowed: a writable folder that" \
      "every node has"
  fi
  rm -f "$probe"
}

# for the front door alone: prints why no Slurm answers here
opcd_no_slurm() {
  local said
  if ! command -v sbatch >/dev/null; then
    echo "sbatch: not there"
  elif ! said=$(sinfo -h -o %P 2>&1); then
    echo "sinfo: ${said%%$'\n'*}"
  else
    return 1
  fi
}

# for the front door alone: what the cluster has
opcd_check_cluster() { # ARGUMENT...
  local partition=${OPCD_PARTITION:-${SBATCH_PARTITION:-}} most
  [[ -n $partition ]] || partition=$(sinfo -h -o %P | sed -n 's/\*$//p')
  [[ -n $(sinfo -h -p "$partition" -o %P 2>/dev/null) ]] || opcd_refuse \
    "OPCD_PARTITION=$partition: no such partition; allowed: $(sinfo -h -o %R | paste -sd, -)"
  most=$(sinfo -h -p "$partition" -o %G | grep -oE 'gpu:([^:,(]+:)?[0-9]+' | sed 's/.*://' |
    sort -n | tail -n 1)
  ((gpus <= ${most:-0})) || opcd_refuse "OPCD_GPUS_PER_NODE=$gpus: nodes of partition" \
    "$partition have ${most:-0}; allowed: at most that"
  opcd_check_account "$partition"
  local refusal
  if ! refusal=$(sbatch --test-only "${flags[@]}" "$OPCD_SCRIPT" "$@" 2>&1); then
    refusal=${refusal##*error: }
    opcd_refuse "sbatch refuses: ${refusal//$'\n'/; }; allowed: what sinfo and scontrol show"
  fi
}

# what is not known here (no answer, no list, several partitions) is for `sbatch --test-only`
opcd_check_account() { # PARTITION
  local account=${OPCD_ACCOUNT:-${SBATCH_ACCOUNT:-}} allowed config
  [[ $1 != *,* ]] || return 0
  config=$(scontrol show config)
  [[ -n $account ]] ||
    account=$(sacctmgr -nP show user "$(id -un)" format=defaultaccount 2>/dev/null)
  [[ -n $account || $config =~ AccountingStorageType[\ =]+accounting_storage/none ]] || return 0
  allowed=$(scontrol show partition "$1" -o | grep -oE 'AllowAccounts=[^ ]+' | cut -d= -f2)
  if [[ $allowed == ALL ]]; then
    [[ $config =~ AccountingStorageEnforce[^$'\n']*associations ]] || return 0
    allowed=$(sacctmgr -nP show assoc "user=$(id -un)" format=account 2>/dev/null | sort -u |
      paste -sd, -)
  fi
  [[ -z $allowed || ,$allowed, == *,$account,* ]] || opcd_refuse \
    "OPCD_ACCOUNT=$account: no account of partition $1; allowed: $allowed"
}

# --- the command ------------------------------------------------------------------------------

# fills `command`: what every node runs
opcd_command() { # KIND ARGUMENT...
  local kind=$1 argument
  shift
  for argument in "$@"; do
    case $argument in
      name=* | exp_manager.exp_dir=* | parallel.num_ranks=* | recipe=* | parallel=*)
        opcd_refuse "$argument: allowed: as a variable (OPCD_NAME, OPCD_OUTPUT, OPCD_NODES and" \
          "OPCD_RANKS_PER_NODE, OPCD_RECIPE, OPCD_PARALLEL)" ;;
    esac
  done
  overrides=("recipe=$OPCD_RECIPE" "name=$OPCD_NAME" "exp_manager.exp_dir=$OPCD_OUTPUT"
    "parallel.num_ranks=$((nodes * ranks))" ${OPCD_PARALLEL:+"parallel=$OPCD_PARALLEL"})
  if ((engine_gpus)); then # recipes give the width of the other engine
    overrides+=(engine=vllm engine.launch=true "engine.gpus=$engine_gpus" engine.max_batch_size=128)
  fi
  if [[ $kind == train ]]; then
    overrides+=(exp_manager=job) # opcd launch adds it too
    command=("$OPCD_PYTHON" -m opcd_nemo.cli train)
  else
    overrides+=("stage=$OPCD_PIPELINE_STAGE")
    command=("$OPCD_PYTHON" -m opcd_nemo.cli experience)
  fi
  if [[ -n ${OPCD_STAGE_COMMAND:-} ]]; then read -ra command <<<"$OPCD_STAGE_COMMAND"; fi
  overrides+=("$@")
  command+=("${overrides[@]}")
}

# fills `container`: pyxis' options, or nothing
opcd_container() {
  container=()
  [[ -n $OPCD_IMAGE ]] || return 0
  local mounts=$OPCD_ROOT:$OPCD_ROOT,$OPCD_OUTPUT:$OPCD_OUTPUT${OPCD_MOUNTS:+,$OPCD_MOUNTS} names
  # the image sets some of these too; the job's count
  names=$(compgen -e | grep -E '^(OPCD|NCCL|GLOO|TORCH|HF|CUDA_DEVICE)_|^PYTHON(PATH|FAULTHANDLER)$')
  container=("--container-image=$OPCD_IMAGE" "--container-mounts=$mounts"
    "--container-workdir=$OPCD_ROOT" --no-container-mount-home
    "--container-env=$(paste -sd, - <<<"$names")")
}

# an attempt has this port and the next one: see `_rendezvous` in opcd_nemo/launch/ranks.py
opcd_port() { echo $((15000 + SLURM_JOB_ID % 1500 * 10 + attempt % 5 * 2)); }

# fills `step`: one task a node, every node's ranks below it
opcd_step() { # NODE...
  local list
  list=$(IFS=,; echo "$*")
  OPCD_RENDEZVOUS=$1:$(opcd_port)
  export OPCD_RENDEZVOUS OPCD_NUM_NODES=$# OPCD_ATTEMPT=$SLURM_JOB_ID.$attempt
  export OPCD_HEARTBEAT=$here/heartbeat OPCD_HERE=$here
  opcd_container
  step=(srun "--nodes=$#" "--ntasks=$#" --ntasks-per-node=1 "--nodelist=$list"
    --kill-on-bad-exit=1 --wait=60 --label --open-mode=append "--output=$here/ranks.log"
    --chdir="$OPCD_ROOT" "${container[@]}" bash "$OPCD_ROOT/slurm/node.sh" "${command[@]}")
}

opcd_dry_run() { # CONFIG
  local SLURM_JOB_ID=${SLURM_JOB_ID:-1} attempt=0 here=$OPCD_OUTPUT/slurm/JOB/attempt-0 names
  mapfile -t names < <(seq -f 'node%g' 1 "$nodes")
  opcd_step "${names[@]}"
  printf '%q ' "${step[@]}" && echo
  opcd_compose "$1" && opcd_rehearse "$1"
}

# two layers of each model go through whole steps on GPUs that do not exist, on this machine
opcd_rehearse() { # CONFIG
  local python=$OPCD_PYTHON
  [[ $OPCD_REHEARSE == 1 ]] || return 0
  if [[ $1 != train || -n ${OPCD_STAGE_COMMAND:-} ]]; then
    echo "# only a training run is rehearsed"
  elif [[ -n $OPCD_IMAGE ]] && ! python=$(opcd_host_python); then
    echo "# no Python of this machine has the project (OPCD_PYTHON_HOST): the run is not rehearsed" >&2
  elif ! command -v g++ >/dev/null; then
    echo "# g++ is not there: the run is not rehearsed" >&2
  else
    (cd "$OPCD_ROOT" && exec "$python" -m opcd_nemo.cli rehearse "${overrides[@]}")
  fi
}

# the composed and checked configuration, where a Python for it is here
opcd_compose() { # CONFIG
  local python=$OPCD_PYTHON
  if [[ -n ${OPCD_STAGE_COMMAND:-} ]]; then
    echo "# OPCD_STAGE_COMMAND composes its own configuration"
    return
  fi
  if [[ -n $OPCD_IMAGE ]] && ! python=$(opcd_host_python); then
    echo "# no Python of this machine has the project (OPCD_PYTHON_HOST): the configuration is" \
      "checked in the image" >&2
    return
  fi
  command -v "$python" >/dev/null || opcd_refuse "OPCD_PYTHON_HOST=$python: not there; allowed: a" \
    "Python of this machine with the project"
  (cd "$OPCD_ROOT" && exec "$python" slurm/compose.py "$1" "${overrides[@]}")
}

# a Python outside the image that can import the project
opcd_host_python() {
  local python
  if [[ -n ${OPCD_PYTHON_HOST:-} ]]; then
    echo "$OPCD_PYTHON_HOST"
    return
  fi
  for python in "$OPCD_ROOT/.venv/bin/python" python3; do
    if "$python" -c 'import opcd_nemo.config.train, opcd_nemo.launch.compose' &>/dev/null; then
      echo "$python"
      return
    fi
  done
  return 1
}

# --- the front door: submit this script ---------------------------------------------------------

opcd_submit() { # CONFIG ARGUMENT...
  local config=$1 flags missing
  shift
  flags=(--export=ALL "--nodes=$((nodes + OPCD_SPARE_NODES))" "--gpus-per-node=$gpus"
    ${OPCD_ACCOUNT:+"--account=$OPCD_ACCOUNT"} ${OPCD_PARTITION:+"--partition=$OPCD_PARTITION"}
    ${OPCD_TIME:+"--time=$OPCD_TIME"} ${OPCD_DEPENDENCY:+"--dependency=$OPCD_DEPENDENCY"}
    ${OPCD_DEPENDENCY:+--kill-on-invalid-dep=yes})
  local extra
  read -ra extra <<<"${OPCD_SBATCH_FLAGS:-}"
  flags+=("${extra[@]}")
  export OPCD_NODES=$nodes OPCD_RANKS_PER_NODE=$ranks
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' sbatch "${flags[@]}" "$OPCD_SCRIPT" "$@" && echo
    opcd_dry_run "$config" || exit
  fi
  if missing=$(opcd_no_slurm); then
    [[ ${DRY_RUN:-0} == 1 ]] ||
      opcd_refuse "$missing; allowed: a machine of a Slurm cluster that answers"
    echo "# no Slurm answers: partition, account and size are not checked ($missing)" >&2
    exit 0
  fi
  opcd_check_cluster "$@"
  [[ ${DRY_RUN:-0} != 1 ]] || exit 0
  opcd_compose "$config" >/dev/null || exit
  exec sbatch --parsable "${flags[@]}" "$OPCD_SCRIPT" "$@"
}

# --- the job ------------------------------------------------------------------------------------

# a trapped signal makes `wait` return early
opcd_wait() { # PID
  local code
  while :; do
    wait "$1"
    code=$?
    kill -0 "$1" 2>/dev/null || break
  done
  wait "$1" 2>/dev/null
  local last=$?
  return $((last == 127 ? code : last))
}

# fills `fit` and `unfit`, the nodes that may train and those that may not
opcd_health_gate() {
  local all node line reports=$here/health.log
  fit=() unfit=()
  mapfile -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  date +%s.%N >"$here/canary"
  # a sick node must not take the check of the others down with it; its answer comes by srun, as
  # the shared folder may be what is sick
  timeout -k 10 180 srun --kill-on-bad-exit=0 --nodes="${#all[@]}" --ntasks="${#all[@]}" \
    --ntasks-per-node=1 --chdir=/ bash "$OPCD_ROOT/slurm/node_check.sh" "$here" "$gpus" \
    "$EPOCHREALTIME" >"$reports" 2>&1 </dev/null &
  opcd_wait $!
  for node in "${all[@]}"; do
    line=$(grep "^$node: " "$reports" | tail -n 1)
    opcd_judge "$node" "${line:-$node: no answer}"
  done
  ((${#fit[@]} >= nodes)) && ((OPCD_PROBE_MIB > 0)) && opcd_probe
  opcd_say "health gate: fit for work: ${fit[*]:-none}; not: ${unfit[*]:-none}"
}

opcd_judge() { # NODE REPORT
  if [[ $2 == "$1: ok" ]]; then fit+=("$1"); else
    unfit+=("$1")
    opcd_say "health gate: $2"
  fi
}

# every pair of neighbours sums a tensor; a node is sick when no pair with it is fast enough
opcd_probe() {
  local tested=("${fit[@]}") node line reports=$here/probe.log
  fit=()
  opcd_container
  OPCD_RANKS_PER_NODE=$ranks OPCD_PROBE_PORT=$(($(opcd_port) + 16000)) \
    timeout -k 10 $((7 * OPCD_PROBE_TIMEOUT_S)) srun --kill-on-bad-exit=0 --nodes="${#tested[@]}" --ntasks="${#tested[@]}" \
    --ntasks-per-node=1 --nodelist="$(IFS=,; echo "${tested[*]}")" --chdir="$OPCD_ROOT" \
    "${container[@]}" "$OPCD_PYTHON" slurm/allreduce_probe.py "${tested[@]}" \
    >"$reports" 2>&1 </dev/null &
  opcd_wait $!
  grep -qE "^($(IFS='|'; echo "${tested[*]}")): " "$reports" || [[ $received ]] ||
    opcd_end "$EXIT_BAD_INPUT" "the all-reduce probe started on no node:" \
      "$(opcd_first_error "$reports"); allowed: an OPCD_IMAGE and OPCD_MOUNTS that every node has," \
      "and an OPCD_PYTHON with torch"
  for node in "${tested[@]}"; do
    line=$(grep "^$node: " "$reports" | tail -n 1)
    opcd_judge "$node" "${line:-$node: no all-reduce with any neighbour}"
  done
}

# stops a stage when the file STOP comes (a training sees it by itself), and ends an attempt that
# makes no progress: the ranks print their stacks
opcd_watchdog() { # KIND PID
  local age told=''
  while sleep 5 && kill -0 "$2" 2>/dev/null; do
    if [[ $1 == stage && -z $told && -e $stop_file ]]; then
      opcd_say "$stop_file: the ranks save what they can"
      kill -USR1 "$2"
      told=1
    fi
    touch "$here/now" # by the clock of the shared folder, as the heartbeat
    age=$(($(stat -c %Y "$here/now") - $(stat -c %Y "$OPCD_HEARTBEAT")))
    ((age > OPCD_HEARTBEAT_TIMEOUT_S)) || continue
    opcd_say "watchdog: no heartbeat for $age s (OPCD_HEARTBEAT_TIMEOUT_S); see the stacks in" \
      "$here/ranks.log"
    kill -USR2 "$2"
    sleep 45
    scancel --signal=KILL "$SLURM_JOB_ID" # of the steps; not of this script
    return
  done
}

# SIGUSR1 comes before the time limit, SIGTERM at a preemption or a cancellation; to srun both go
# as SIGUSR1, which it hands on: SIGTERM would end it
opcd_on_signal() { # NAME
  opcd_say "SIG$1: the ranks save after this step"
  if [[ $1 == USR1 && -z $timer_pid ]]; then
    { sleep "$OPCD_REQUEUE_AFTER_S" && kill -ALRM $$; } &
    timer_pid=$!
  fi
  [[ $received == USR1 ]] || received=$1 # a limit that was announced is also enforced, by SIGTERM
  [[ -z $step_pid ]] || kill -USR1 "$step_pid" 2>/dev/null
}

# a step can be longer than what is left: what is not saved by now is done again
opcd_on_timer() {
  opcd_say "the step has not ended in $OPCD_REQUEUE_AFTER_S s (OPCD_REQUEUE_AFTER_S)"
  opcd_requeue
}

opcd_job() { # KIND
  local run=$OPCD_OUTPUT/$OPCD_NAME
  attempt=${SLURM_RESTART_COUNT:-0}
  here=$OPCD_OUTPUT/slurm/$SLURM_JOB_ID/attempt-$attempt
  mkdir -p "$here"
  if [[ $1 == train ]]; then done_file=$run/DONE; else done_file=$here/DONE; fi
  stop_file=$run/STOP
  opcd_say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, log $here/ranks.log"
  if [[ -e $done_file ]]; then
    opcd_say "nothing to do: $done_file is there; another OPCD_NAME starts anew"
    exit 0
  fi
  opcd_check_stop
  ((attempt <= OPCD_MAX_RESTARTS)) || opcd_give_up
  received='' step_pid='' timer_pid=''
  trap 'opcd_on_signal USR1' USR1
  trap 'opcd_on_signal TERM' TERM
  trap opcd_on_timer ALRM
  opcd_health_gate
  ((${#fit[@]} >= nodes)) || opcd_end "$EXIT_DO_NOT_RESTART" "${#fit[@]} nodes are fit for work," \
    "$nodes are needed, not fit: ${unfit[*]}; allowed: sbatch --exclude, or OPCD_SPARE_NODES"
  [[ -z $received ]] || opcd_after_signal
  opcd_step "${fit[@]:0:nodes}"
  touch "$OPCD_HEARTBEAT"
  "${step[@]}" </dev/null &
  step_pid=$!
  opcd_watchdog "$1" "$step_pid" &
  watchdog_pid=$!
  opcd_wait "$step_pid"
  opcd_conclude "$1" $?
}

opcd_check_stop() {
  [[ ! -e $stop_file ]] || opcd_end "$EXIT_DO_NOT_RESTART" "stopped by $stop_file; allowed:" \
    "submit again without that file"
}

opcd_end() { # CODE WORDS...
  local code=$1
  shift
  opcd_say "error: $*"
  exit "$code"
}

opcd_give_up() {
  opcd_end "$EXIT_DO_NOT_RESTART" "gave up after $OPCD_MAX_RESTARTS restarts; allowed: submit" \
    "again, or a larger OPCD_MAX_RESTARTS"
}

# success is the DONE file alone: after the loss of a node srun may end with 0
opcd_conclude() { # KIND CODE
  local codes
  # shellcheck disable=SC2086
  kill "$watchdog_pid" $timer_pid 2>/dev/null
  codes=$(cat "$here"/exit-* 2>/dev/null | sort -n | uniq | paste -sd' ' -)
  opcd_say "srun ended with $2; exit codes of the nodes: ${codes:-none}"
  [[ $1 == train || $codes != 0 || $(cat "$here"/exit-* | wc -l) != "$nodes" ]] || touch "$done_file"
  if [[ -e $done_file ]]; then
    opcd_say "done: $done_file"
    exit 0
  fi
  grep -hE '(error|stopped by)' "$here/ranks.log" 2>/dev/null | tail -n 3
  opcd_check_stop
  case " $codes " in
    *" $EXIT_BAD_INPUT "*) exit "$EXIT_BAD_INPUT" ;;
    *" $EXIT_DO_NOT_RESTART "*) exit "$EXIT_DO_NOT_RESTART" ;;
  esac
  opcd_after_signal
  compgen -G "$here/started-*" >/dev/null || opcd_end "$EXIT_BAD_INPUT" "the command started on no" \
    "node: $(opcd_first_error "$here/ranks.log"); allowed: an OPCD_IMAGE and OPCD_MOUNTS that every node has"
  opcd_requeue
}

# the cause comes first, what it breaks after it; that a task has ended is no cause
opcd_first_error() { # LOG
  local line
  line=$(grep -vE 'error: (.*: (Exited with|Killed|Terminated)|\*\*\* .* CANCELLED AT)' "$1" |
    grep -m 1 -oE '[A-Za-z]*[Ee]rror: .*')
  echo "${line:-srun does not say why}"
}

opcd_after_signal() {
  case $received in
    TERM) exit "$EXIT_STOPPED" ;; # preempted: Slurm starts it again; cancelled: it must not
    USR1) opcd_requeue ;;
  esac
}

opcd_requeue() {
  opcd_check_stop
  ((attempt < OPCD_MAX_RESTARTS)) || opcd_give_up
  # a script on a node that was cut off must not restart the attempt that replaced it
  local restarts
  restarts=$(scontrol show job "$SLURM_JOB_ID" -o | grep -oE 'Restarts=[0-9]+' | cut -d= -f2)
  [[ $restarts == "$attempt" ]] || opcd_end 1 "attempt ${restarts:-unknown} has replaced this one"
  opcd_say "requeue"
  trap - TERM USR1 ALRM
  scontrol requeue "$SLURM_JOB_ID" || opcd_end "$EXIT_STOPPED" "Slurm does not requeue; allowed:" \
    "submit again, it continues"
  sleep 600 # until Slurm ends this script
}

# --------------------------------------------------------------------------------------------------

opcd_main() { # KIND ARGUMENT...
  local kind=$1 config=train
  shift
  [[ $kind == train ]] || config=experience
  opcd_settings
  opcd_check
  opcd_command "$kind" "$@"
  if [[ -z ${SLURM_JOB_ID:-} ]]; then
    opcd_submit "$config" "$@"
  elif [[ ${DRY_RUN:-0} == 1 ]]; then
    opcd_dry_run "$config"
  else
    opcd_job "$kind"
  fi
}
