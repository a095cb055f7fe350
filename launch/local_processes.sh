#!/usr/bin/env bash
# One run over several processes of this machine, each with its own (virtual CPU) devices: the way to try, without a
# cluster, what a cluster does. Needs nothing but bash 3.2.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/local_processes.sh [OPTIONS] -- ARGUMENTS OF relay_jax.main

  -n N         processes (default 2)
  -k K         virtual CPU devices of each (default 1; more work, but a busy machine may stall in their collectives)
  --port P     port of process 0 (default: one derived from this shell's process number)
  --logs DIR   output of each process to DIR/process-I.log instead of the console
  --restarts R start again at most R times when the processes ask for it (status 75: stopped by SIGTERM and saved)
  --dry-run    print the commands and do nothing
  --help       this text

Environment: PYTHON (default python), JAX_PLATFORMS (default cpu).
Exit status: 0, or the first one that was not 0; the other processes are ended then. SIGTERM is passed on.
Example: launch/local_processes.sh -n 2 -k 2 -- --config=configs/demo.py:smoke --workdir=runs/two
TEXT
}

processes=2 devices=1 port=$((20000 + $$ % 20000)) logs='' restarts=0 dry=''
while (($#)); do
  case $1 in
    -n) processes=$2; shift 2 ;;
    -k) devices=$2; shift 2 ;;
    --port) port=$2; shift 2 ;;
    --logs) logs=$2; shift 2 ;;
    --restarts) restarts=$2; shift 2 ;;
    --dry-run) dry=1; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) echo "error: unknown option $1; see --help" >&2; exit 2 ;;
  esac
done
for number in "$processes" "$devices" "$port" "$restarts"; do
  case $number in '' | *[!0-9]*) echo "error: not a number: $number; see --help" >&2; exit 2 ;; esac
done
if ((processes < 1 || devices < 1)); then echo "error: at least one process and one device" >&2; exit 2; fi
if ((!$#)); then echo "error: what should run? give the arguments of relay_jax.main after --" >&2; exit 2; fi

root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} JAX_NUM_CPU_DEVICES=$devices
export RELAY_COORDINATOR=localhost:$port RELAY_NUM_PROCESSES=$processes
command=("${PYTHON:-python}" -m relay_jax.main "$@")

if [[ $dry ]]; then
  for ((i = 0; i < processes; i++)); do
    printf 'JAX_PLATFORMS=%s JAX_NUM_CPU_DEVICES=%s RELAY_COORDINATOR=%s RELAY_NUM_PROCESSES=%s RELAY_PROCESS_ID=%s' \
      "$JAX_PLATFORMS" "$JAX_NUM_CPU_DEVICES" "$RELAY_COORDINATOR" "$RELAY_NUM_PROCESSES" "$i"
    printf ' %q' "${command[@]}"
    printf '\n'
  done
  exit 0
fi

pids=() ended='' stopping=''
signal_all() { for pid in "${pids[@]}"; do kill -s "$1" "$pid" 2>/dev/null || true; done; }
trap 'stopping=1; signal_all TERM' TERM
trap 'signal_all KILL; exit 130' INT
trap 'signal_all KILL' EXIT

run_once() {    # the first status that is not 0, in $status
  pids=() ended='' status=0
  for ((i = 0; i < processes; i++)); do
    if [[ $logs ]]; then
      mkdir -p "$logs"
      RELAY_PROCESS_ID=$i "${command[@]}" >>"$logs/process-$i.log" 2>&1 &
    else
      RELAY_PROCESS_ID=$i "${command[@]}" &
    fi
    pids+=($!)
  done
  local left=$processes since=0
  while ((left)); do
    sleep 0.2 || true       # a signal ends it early
    for ((i = 0; i < processes; i++)); do
      if [[ $ended == *" $i "* ]] || kill -0 "${pids[$i]}" 2>/dev/null; then continue; fi
      local one=0
      wait "${pids[$i]}" || one=$?
      ended+=" $i " left=$((left - 1))
      if ((status == 0)); then status=$one; fi
    done
    if ((left && status)); then     # the others wait for one that has gone; in agreement they end within moments
      since=$((since + 1))
      if ((since == 50)); then signal_all KILL; fi
    fi
  done
  pids=()
}

while :; do
  run_once
  if ((status != 75 || restarts == 0)) || [[ $stopping ]]; then exit "$status"; fi
  restarts=$((restarts - 1))
  echo "stopped and saved; starting again" >&2
done
