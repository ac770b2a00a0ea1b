#!/usr/bin/env bash
# Run one command as several processes that form one JAX run, on this host or on this host's part of several.
#
#   experiments/run_multihost.sh ulysses train demo --out runs/two                      two processes on this host
#   PROCESSES=8 experiments/run_multihost.sh ulysses train gpt-7b-64k --out /shared/7b   one process a GPU, 8 GPUs
#
# One process a host, all its GPUs: run this on both hosts, HOST=0 on the one that COORDINATOR names.
#   PROCESSES=1 HOSTS=2 HOST=0 COORDINATOR=10.0.0.1:12345 experiments/run_multihost.sh ulysses train …
#
# PROCESSES    processes on this host (2)
# HOSTS, HOST  number of hosts (1), and which of them this is (0)
# COORDINATOR  address and port of process 0; a free port of this host by default, so needed as soon as HOSTS > 1
#
# The run folder must be on a file system that all hosts share. SIGTERM and SIGINT are passed on: the run saves and stops.
# The exit status is 0 if every process' was, else the first other one.
set -uo pipefail

processes=${PROCESSES:-2} hosts=${HOSTS:-1} host=${HOST:-0}
if (($# == 0)); then
  echo "usage: [PROCESSES=2] [HOSTS=1 HOST=0 COORDINATOR=ADDRESS:PORT] $0 COMMAND …" >&2
  exit 2
fi
if ((hosts > 1)) && [[ -z ${COORDINATOR:-} ]]; then
  echo "error: HOSTS is $hosts, so COORDINATOR must be the ADDRESS:PORT of host 0, the same on every host." >&2
  exit 2
fi
if [[ -z ${COORDINATOR:-} ]]; then
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  COORDINATOR=127.0.0.1:$port
fi
export JAX_COORDINATOR_ADDRESS=$COORDINATOR JAX_NUM_PROCESSES=$((hosts * processes))

# Several processes on one host must not all take all of its GPUs: the i-th takes the i-th that is visible.
IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((processes - 1)))}"

children=()
for ((i = 0; i < processes; i++)); do
  export JAX_PROCESS_ID=$((host * processes + i))
  if ((processes > 1)); then
    export CUDA_VISIBLE_DEVICES=${visible[i]:-}
  fi
  "$@" &
  children+=($!)
  echo "process $JAX_PROCESS_ID has pid $!" >&2
done
trap 'kill -TERM "${children[@]}" 2>/dev/null' TERM INT

# The others of a process that failed wait for it in their next all-to-all, deaf to SIGTERM, until jax's heartbeat misses it
# after minutes. There is nothing left for them to save, so they are ended GRACE seconds later.
GRACE=10 status=0 deadline=
while ((${#children[@]})); do
  sleep 0.2
  running=()
  for child in "${children[@]}"; do
    if kill -0 "$child" 2>/dev/null; then
      running+=("$child")
      continue
    fi
    wait "$child"
    code=$?
    if ((code != 0 && status == 0)); then
      status=$code
      ((code == 130)) || deadline=$((SECONDS + GRACE)) # 130: asked to stop, as are the others
    fi
  done
  children=("${running[@]+"${running[@]}"}")
  if [[ -n $deadline ]] && ((SECONDS > deadline && ${#children[@]})); then
    kill -KILL "${children[@]}" 2>/dev/null
  fi
done
exit "$status"
