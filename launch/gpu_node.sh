#!/usr/bin/env bash
# One run on all GPUs of this machine: one process, started again when it was stopped by SIGTERM and has saved.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/gpu_node.sh [OPTIONS] -- ARGUMENTS OF relay_jax.main

  --gpus LIST   use these GPUs alone, e.g. 0,1 (default: all)
  --restarts R  start again at most R times after status 75 (stopped by SIGTERM and saved) when SIGTERM did not come
                through this script (default 100)
  --log FILE    append the output to FILE as well
  --dry-run     print the command and do nothing
  --help        this text

Environment: PYTHON (default python), JAX_PLATFORMS (default cuda,cpu: without a GPU the run ends instead of crawling).
Exit status: that of the run; 75 means that the same command continues it.
Example: launch/gpu_node.sh --log runs/cifar10.log -- --config=configs/cifar10.py --workdir=runs/cifar10
TEXT
}

gpus='' restarts=100 log='' dry=''
while (($#)); do
  case $1 in
    --gpus) gpus=$2; shift 2 ;;
    --restarts) restarts=$2; shift 2 ;;
    --log) log=$2; shift 2 ;;
    --dry-run) dry=1; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) echo "error: unknown option $1; see --help" >&2; exit 2 ;;
  esac
done
if ((!$#)); then echo "error: what should run? give the arguments of relay_jax.main after --" >&2; exit 2; fi

root=$(cd "$(dirname "$0")/.." && pwd)
settings=(PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}" RELAY_NUM_PROCESSES=1)
if [[ $gpus ]]; then settings+=(CUDA_VISIBLE_DEVICES="$gpus"); fi
command=(env "${settings[@]}" "${PYTHON:-python}" -m relay_jax.main "$@")
if [[ $dry ]]; then
  printf '%q ' "${command[@]}"
  printf '%s\n' "${log:+>> $log}"
  exit 0
fi
if [[ $log ]]; then
  mkdir -p "$(dirname "$log")"
  exec > >(tee -a "$log") 2>&1
fi

pid='' stopping=''
trap 'stopping=1; [[ -z $pid ]] || kill -s TERM "$pid" 2>/dev/null || true' TERM
while :; do
  "${command[@]}" &
  pid=$!
  status=0
  wait "$pid" || status=$?
  while kill -0 "$pid" 2>/dev/null; do      # a signal ended `wait`, not the run
    status=0
    wait "$pid" || status=$?
  done
  if ((status != 75 || restarts == 0)) || [[ $stopping ]]; then exit "$status"; fi
  restarts=$((restarts - 1))
  echo "stopped and saved; starting again" >&2
done
