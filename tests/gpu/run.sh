#!/bin/bash
# What only a GPU can prove, in at most 8 minutes on one GPU: no pip, no network, nothing installed.
#
#   tests/gpu/run.sh [OUT]     results go to OUT, build/gpu unless it is given
#
# 1. Kernels and their benchmarks: Python 3.12, torch 2.11 and Triton 3.6 are all they need.
# 2. Steps, with the wheels that `make gpu-wheels` has put into build/gpu-wheels: unpacked, not installed.
#
# OPCD_GPU_DEVICE=cpu tries the script where no GPU is, on small shapes.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2
out=${1:-build/gpu}
device=${OPCD_GPU_DEVICE:-cuda}
wheels=build/gpu-wheels
python=${PYTHON:-python3}
mkdir -p "$out" || exit 2
export PYTHONPATH=$PWD:$PWD/kernels PYTHONUNBUFFERED=1
small=() rows=2048 columns=151936 hidden=4096 slower=1
if [[ $device == cpu ]]; then
  small=(--small) rows=64 columns=1024 hidden=64 slower=5
  export OMP_NUM_THREADS=1
fi
failed=()

# a part that fails or takes too long does not stop the next; all of them have 8 minutes
part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$(($2 * slower)) left=$((470 * slower - SECONDS)) started=$SECONDS
  shift 2
  ((limit < left)) || limit=$left
  if ((limit <= 0)); then
    echo "== $name: no time is left for it"
    failed+=("$name")
    return
  fi
  echo "== $name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  local code=${PIPESTATUS[0]}
  echo "== $name: exit code $code after $((SECONDS - started)) s"
  if ((code)); then failed+=("$name"); fi
}

"$python" - "$device" <<'END' || exit 2
import sys, torch, triton
print("Python", sys.version.split()[0], "torch", torch.__version__, "Triton", triton.__version__)
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("torch sees no GPU; OPCD_GPU_DEVICE=cpu tries this script without one")
print(torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "on the CPU, small shapes")
END

part kernels 150 "$python" -m tests.gpu.kernels --device "$device"
part bench 70 "$python" kernels/bench/bench_divergence.py --device "$device" --rows "$rows" \
  --columns "$columns" --repeats 2 --table "$out/divergence.csv"
part bench-linear 40 "$python" kernels/bench/bench_linear_divergence.py --device "$device" --rows "$rows" \
  --hidden "$hidden" --columns "$columns" --repeats 2 --table "$out/linear_divergence.csv"

if ! compgen -G "$wheels/*.whl" >/dev/null; then
  echo "== no wheels in $wheels: \`make gpu-wheels\` fetches them; the second part is left out"
  failed+=("steps")
else
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  for wheel in "$wheels"/*.whl; do "$python" -m zipfile -e "$wheel" "$site" || exit 2; done
  export PYTHONPATH=$PYTHONPATH:$site
  part tiny 60 "$python" -m tests.gpu.steps tiny --device "$device" --out "$out"
  part wide 100 "$python" -m tests.gpu.steps wide --device "$device" --out "$out" "${small[@]}"
  part decode 60 "$python" -m tests.gpu.steps decode --device "$device" --out "$out" "${small[@]}"
fi
echo "== ${#failed[@]} parts failed: ${failed[*]:-none}; $SECONDS s in all"
exit $((${#failed[@]} > 0))
