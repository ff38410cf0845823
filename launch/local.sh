#!/usr/bin/env bash
# Starts N processes of one run on this machine, and again when they end with code 75 (stopped but saved, or one lost).
#
#   launch/local.sh N CONFIG --workdir=DIRECTORY [flags of rmjax.main...]
#   launch/local.sh 2 configs/bt_tiny.py --workdir=runs/tiny
#   launch/local.sh 2 rmjax.score --model=DIR --input=FILE --output=FILE    another command than rmjax.main
#
# GPUs are dealt out evenly. On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=2 gives each process two devices.
# TERM and INT are passed on; they end the run, which saves first. The exit code is the run's (rmjax/runtime/exits.py).
#
# To edit, or to set in the environment:
PYTHON=${PYTHON:-python}     # of the environment that has rmjax
RESTARTS=${RESTARTS:-20}     # times that the run is started again, at most
PORT=${PORT:-$((20000 + RANDOM % 10000))}
PATIENCE=${PATIENCE:-60}     # seconds that the others get to end by themselves when one has failed
set -um                      # -m: processes of their own groups, whom Ctrl-C reaches through this script only

if (($# < 2)) || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N CONFIG --workdir=DIRECTORY [flags...], or N rmjax.COMMAND [flags...]" >&2
  exit 2
fi
count=$1 config=$2
shift 2
gpus=$(nvidia-smi -L 2>/dev/null | wc -l)
stopped=0
declare -A pids=()

pass_on() {
  stopped=1
  ((${#pids[@]})) && kill -s "$1" "${pids[@]}" 2>/dev/null
}
trap 'pass_on TERM' TERM HUP
trap 'pass_on INT' INT

start() {
  local number each=$((gpus / count)) RMJAX_SECRET
  RMJAX_SECRET=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n') # by which these processes know each other; new each time
  export RMJAX_SECRET
  for ((number = 0; number < count; number++)); do
    (
      export JAX_COORDINATOR_ADDRESS=localhost:$PORT JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$number
      if ((each > 0)); then
        export CUDA_VISIBLE_DEVICES
        CUDA_VISIBLE_DEVICES=$(seq -s, $((number * each)) $(((number + 1) * each - 1)))
      fi
      [[ $config == rmjax.* ]] && exec "$PYTHON" -m "$config" "$@"
      exec "$PYTHON" -m rmjax.main --config="$config" "$@"
    ) &
    pids[$number]=$!
  done
}

# Sets `code`: the first of 2, 1, 130, 75 that a process ended with, else the last that is not 0.
finish() {
  local number status failed=-1 seen=" "
  code=0
  while ((${#pids[@]})); do
    for number in "${!pids[@]}"; do
      kill -0 "${pids[$number]}" 2>/dev/null && continue
      wait "${pids[$number]}"
      status=$?
      unset "pids[$number]"
      if ((status)); then
        seen+="$status "
        code=$status
        ((failed < 0)) && failed=$SECONDS
      fi
    done
    if ((failed >= 0 && SECONDS - failed > PATIENCE && ${#pids[@]})); then
      kill -s KILL "${pids[@]}" 2>/dev/null
    fi
    sleep 0.1
  done
  for status in 75 130 1 2; do
    [[ $seen == *" $status "* ]] && code=$status
  done
}

for ((attempt = 0; ; attempt++)); do
  start "$@"
  finish
  if ((code != 75 || stopped || attempt >= RESTARTS)); then
    exit $code
  fi
  echo "launch/local.sh: starting again ($((attempt + 1)) of at most $RESTARTS times)" >&2
  sleep 1
done
