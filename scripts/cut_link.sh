#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Cuts the network link of one of two hosts that train together, and times their ends.
#
#   scripts/cut_link.sh CONFIG WORKDIR [1|2]
#
# The hosts are network namespaces of this machine, so it takes root, iproute2 and
# util-linux; process 0 is on host 1. CONFIG needs two devices, and WORKDIR no run.
set -euo pipefail
ulimit -c 0
if [ $# -lt 2 ]; then
  sed -n '3,8p' "$0" >&2
  exit 2
fi
config=$1 workdir=$2 cut=${3:-2}
python=${PYTHON:-python}
mkdir -p "$workdir"

down() {
  for name in cut1 cut2 cutsw; do
    ip netns del "$name" 2> /dev/null || true
    rm -rf "/etc/netns/$name"
  done
}
trap down EXIT
down

ip netns add cutsw
ip -n cutsw link add bridge type bridge
ip -n cutsw link set bridge up
for i in 1 2; do
  ip netns add "cut$i"
  ip -n cutsw link add "v$i" type veth peer name eth0 netns "cut$i"
  ip -n cutsw link set "v$i" master bridge up
  ip -n "cut$i" link set lo up
  ip -n "cut$i" addr add "10.79.0.1$i/24" dev eth0
  ip -n "cut$i" link set eth0 up
  mkdir -p "/etc/netns/cut$i"
  printf '127.0.0.1 localhost\n10.79.0.11 cut1\n10.79.0.12 cut2\n' \
    > "/etc/netns/cut$i/hosts"
done

# Each host has its own name and table of hosts, as separate machines have.
on() {
  local host=$1
  shift
  exec nsenter --net="/run/netns/$host" unshare --uts --mount --propagation private \
    bash -c 'hostname "$0"; mount --bind "/etc/netns/$0/hosts" /etc/hosts; exec "$@"' \
    "$host" "$@"
}

export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1
export JAXLLM_COORDINATOR=cut1:47123 JAXLLM_NUM_PROCESSES=2
pids=()
for i in 0 1; do
  JAXLLM_PROCESS_ID=$i on "cut$((i + 1))" "$python" -m jaxllm.train \
    --config="$config" --workdir="$workdir" > "$workdir.$i.log" 2>&1 &
  pids+=($!)
done
until grep -q '"step": 10,' "$workdir/metrics.jsonl" 2> /dev/null; do
  kill -0 "${pids[@]}"
  sleep 0.1
done
ip -n cutsw link set "v$cut" down
began=$(date +%s.%N)
for i in 0 1; do
  status=0
  wait "${pids[$i]}" || status=$?
  echo "process $i: $status after $(echo "$(date +%s.%N) $began" |
    awk '{printf "%.1f", $1 - $2}') s"
  grep '^error' "$workdir.$i.log" || true
done
