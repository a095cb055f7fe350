#!/usr/bin/env bash
# One run on a Cloud TPU slice of any number of hosts, from this machine, with gcloud.
set -euo pipefail
# `-e` sleeps inside functions that are called before && or ||, as ours are: they say `|| return` themselves.

usage() {
  cat <<'TEXT'
Usage: launch/tpu_pod.sh [OPTIONS] COMMAND [-- ARGUMENTS OF relay_jax.main]

Commands, in the order of their use:
  up        request the slice (queued resource) unless it is there, and wait until it is ready
  install   copy this repository to all hosts, install Python, JAX for TPU and the requirements, mount the bucket
  run       start the run on all hosts, in the background; the same command continues an interrupted run
  watch     follow the run until it ends
  stop      SIGTERM: the run saves and ends with status 75
  logs      fetch the logs of all hosts to ./logs-NAME
  down      delete the slice (the bucket stays)
  all       up, install, run, watch
  keep      all, and again after each pre-emption or status 75, until the run has ended; for spot slices

Options (or environment variables of the names in brackets):
  --name NAME     of the slice and of its request [NAME, default relay]
  --zone ZONE     [ZONE, default: gcloud's]
  --type TYPE     accelerator type [TYPE, default v5litepod-16]
  --version V     TPU software [VERSION, default: the one for TYPE]
  --bucket B      Cloud Storage bucket, mounted as ~/bucket on all hosts [BUCKET]
  --spot          pre-emptible and cheaper [SPOT=1]
  --dry-run       print the gcloud commands and do nothing
  --help          this text

All hosts must share the workdir and the data: use --workdir=bucket/runs/NAME (paths are relative to the home directory
of the hosts, where the repository is ./relay and the configurations are therefore relay/configs/...). Create the bucket
with hierarchical namespace, so that a checkpoint's folder appears under its name at once:
  gcloud storage buckets create gs://B --uniform-bucket-level-access --enable-hierarchical-namespace
Example:
  launch/tpu_pod.sh --spot --type v5litepod-64 --bucket B keep -- \
    --config=relay/configs/imagenet256.py --workdir=bucket/runs/imagenet
TEXT
}

name=${NAME:-relay} zone=${ZONE:-} type=${TYPE:-v5litepod-16} version=${VERSION:-} bucket=${BUCKET:-} spot=${SPOT:-}
dry='' verb='' poll=${POLL_SECONDS:-30}
while (($#)); do
  case $1 in
    --name) name=$2; shift 2 ;;
    --zone) zone=$2; shift 2 ;;
    --type) type=$2; shift 2 ;;
    --version) version=$2; shift 2 ;;
    --bucket) bucket=$2; shift 2 ;;
    --spot) spot=1; shift ;;
    --dry-run) dry=1; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    up | install | run | watch | stop | logs | down | all | keep)
      if [[ $verb ]]; then echo "error: one command, not $verb and $1" >&2; exit 2; fi
      verb=$1; shift ;;
    *) echo "error: unknown command or option $1; see --help" >&2; exit 2 ;;
  esac
done
if [[ -z $verb ]]; then echo "error: give a command; see --help" >&2; exit 2; fi
case $verb in
  run | all | keep) if ((!$#)); then echo "error: what should run? give the arguments of relay_jax.main after --" >&2; exit 2; fi ;;
  *) if (($#)); then echo "error: $verb takes no arguments after --" >&2; exit 2; fi ;;
esac
if [[ -z $version ]]; then
  case $type in
    v6e-*) version='v2-alpha-tpuv6e' ;;
    v5p-*) version='v2-alpha-tpuv5' ;;
    v5litepod-*) version='v2-alpha-tpuv5-lite' ;;
    *) version='tpu-ubuntu2204-base' ;;
  esac
fi
root=$(cd "$(dirname "$0")/.." && pwd)
place=(${zone:+--zone="$zone"})
tpu=(gcloud compute tpus)

act() {     # prints the command, and runs it unless --dry-run
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [[ $dry ]] || "$@"
}
on_hosts() { act "${tpu[@]}" tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"; }
state() {   # of the request: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED ..., or empty if there is none
  if [[ $dry ]]; then echo "${DRY_STATE:-}"; return; fi
  "${tpu[@]}" queued-resources describe "$name" "${place[@]}" --format='value(state.state)' 2>/dev/null || true
}

up() {
  local now
  now=$(state)
  case $now in
    SUSPENDED | SUSPENDING | FAILED) down || return; now='' ;;     # pre-empted: the request does not come back by itself
  esac
  if [[ -z $now ]]; then
    act "${tpu[@]}" queued-resources create "$name" --node-id="$name" "${place[@]}" --accelerator-type="$type" \
      --runtime-version="$version" ${spot:+--spot} || return
  fi
  if [[ $dry ]]; then echo "# waits until the state of $name is ACTIVE"; return; fi
  until [[ $(state) == ACTIVE ]]; do
    now=$(state)
    case $now in
      FAILED | SUSPENDED) echo "error: no slice: gcloud compute tpus queued-resources describe $name" >&2; return 1 ;;
    esac
    echo "$name: $now"
    sleep "$poll"
  done
}

install() {
  local archive
  archive=${TMPDIR:-/tmp}/relay-$name.tar.gz
  act tar -czf "$archive" -C "$root" --exclude=.git --exclude=runs --exclude=.cache --exclude=__pycache__ . || return
  act "${tpu[@]}" tpu-vm scp "$archive" "$name:relay.tar.gz" "${place[@]}" --worker=all || return
  # The hosts' own Python may be older than 3.11: uv brings one. ($HOME is theirs.)
  # shellcheck disable=SC2016
  on_hosts all 'set -e; mkdir -p relay; tar -xzf relay.tar.gz -C relay; uv=$HOME/.local/bin/uv
[ -x $uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -d venv ] || $uv venv --python 3.12 venv
$uv pip install -q --python venv/bin/python -r relay/requirements.txt "jax[tpu]>=0.10,<0.12"' || return
  if [[ $bucket ]]; then
    on_hosts all "set -e; command -v gcsfuse || {
key=/etc/apt/trusted.gpg.d/gcsfuse.asc packages=https://packages.cloud.google.com/apt
curl -s \$packages/doc/apt-key.gpg | sudo tee \$key >/dev/null
echo \"deb \$packages gcsfuse-\$(lsb_release -cs) main\" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
sudo apt-get -qq update; sudo apt-get -qq install -y gcsfuse; }
mkdir -p bucket; mountpoint -q bucket || gcsfuse --implicit-dirs --rename-dir-limit=100000 $bucket bucket"
  fi
}

run() {     # the hosts find each other through the metadata server; the status of each is left in its home
  local arguments
  arguments=$(printf ' %q' "$@")
  on_hosts all "if [ -f relay.pid ] && kill -0 \$(cat relay.pid) 2>/dev/null; then echo runs already; exit 0; fi
rm -f relay.status
(PYTHONPATH=relay setsid nohup venv/bin/python -m relay_jax.main$arguments >>relay.log 2>&1 &
 echo \$! >relay.pid; status=0; wait \$! || status=\$?; echo \$status >relay.status) >/dev/null 2>&1 </dev/null &"
}

stop() { on_hosts all "kill -s TERM \$(cat relay.pid)"; }

logs() {
  act mkdir -p "logs-$name"
  local hosts=1
  [[ $dry ]] || hosts=$("${tpu[@]}" tpu-vm describe "$name" "${place[@]}" --format='value(networkEndpoints.len())')
  for ((host = 0; host < hosts; host++)); do
    act "${tpu[@]}" tpu-vm scp "$name:relay.log" "logs-$name/host-$host.log" "${place[@]}" --worker="$host"
  done
}

down() { act "${tpu[@]}" queued-resources delete "$name" "${place[@]}" --force --quiet; }

watch() {   # the run's status; 75 too if the slice has gone
  if [[ $dry ]]; then echo "# follows host 0 until it has a status: 0 done, 75 start again, others are errors"; return 0; fi
  local status
  while :; do
    sleep "$poll"
    case $(state) in SUSPENDED | SUSPENDING | FAILED | '') echo "$name has been pre-empted"; return 75 ;; esac
    status=$("${tpu[@]}" tpu-vm ssh "$name" "${place[@]}" --worker=0 \
      --command='tail -n 1 relay.log >&2; cat relay.status 2>/dev/null || true' || true)
    if [[ $status =~ ^[0-9]+$ ]]; then echo "$name: the run has ended with status $status"; return "$status"; fi
  done
}

all() { up && install && run "$@" && watch; }

case $verb in
  keep)
    if [[ $dry ]]; then all "$@"; echo "# and again while the status is 75"; exit 0; fi
    while :; do
      status=0
      all "$@" || status=$?
      if ((status != 75)); then exit "$status"; fi
    done ;;
  *) "$verb" "$@" ;;
esac
