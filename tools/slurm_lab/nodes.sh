# shellcheck shell=bash disable=SC2154  # sourced by tools/slurm-lab, which sets lab, nodes and number
# Nodes: network namespaces on one bridge, each with a process 1 whose end is the node's.

bridge() { echo "upl$number"; }
namespace() { echo "upl$number-$1"; }
link() { echo "upl$number-$1"; }

make_network() {
  local i name
  ! ip link show "$(bridge)" >/dev/null 2>&1 || die "the interface $(bridge) is there: another cluster's? Name another directory in UPCYCLE_SLURM_LAB"
  ip link add "$(bridge)" type bridge
  ip address add "$(controller_address)/24" dev "$(bridge)"
  ip link set "$(bridge)" up
  : >"$lab/etc/hosts"
  echo "127.0.0.1 localhost" >>"$lab/etc/hosts"
  echo "$(controller_address) $(hostname -s)" >>"$lab/etc/hosts"
  for ((i = 1; i <= nodes; ++i)); do
    name=n$i
    echo "$(address_of "$name") $name" >>"$lab/etc/hosts"
    ip netns add "$(namespace "$name")"
    ip link add "$(link "$name")" type veth peer name eth0 netns "$(namespace "$name")"
    ip link set "$(link "$name")" master "$(bridge)" up
    ip -n "$(namespace "$name")" address add "$(address_of "$name")/24" dev eth0
    ip -n "$(namespace "$name")" link set lo up
    ip -n "$(namespace "$name")" link set eth0 up
  done
}

remove_network() {
  local i
  for ((i = 1; i <= nodes; ++i)); do
    ip link del "$(link "n$i")" 2>/dev/null || true
    ip netns del "$(namespace "n$i")" 2>/dev/null || true
  done
  ip link del "$(bridge)" 2>/dev/null || true
}

cut_link() { ip link set "$(link "$1")" down; }
mend_link() { ip link set "$(link "$1")" up; }

# The node's process 1, run in its namespaces: names it, gives it hosts and shared memory of its own, and keeps slurmd.
first_process() {
  local lab=$1 name=$2
  hostname "$name"
  mount --bind "$lab/etc/hosts" /etc/hosts
  mount --bind /dev/null /etc/resolv.conf
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  export SLURM_CONF=$lab/etc/slurm.conf
  unset UPCYCLE_SLURM_LAB
  slurmd -D -N "$name" -f "$lab/etc/slurm.conf" &
  # A process 1 has to collect whatever is orphaned; wait does that for bash.
  while :; do wait -n || sleep 0.2; done
}

start_node() {
  local name=$1
  mkdir -p "$lab/spool/$name" "$lab/tmp/$name"
  export -f first_process
  # Slave: what is mounted on this machine later shows up on the nodes, as a shared disk does.
  start "$name" ip netns exec "$(namespace "$name")" unshare --mount --propagation slave --uts --ipc --pid --fork --kill-child=KILL \
    --mount-proc bash -c 'first_process "$@"' "$name" "$lab" "$name"
}

# The process id, seen from here, of a node's process 1.
first_process_of() {
  local outer
  outer=$(cat "$lab/run/$1.pid" 2>/dev/null) || return 1
  [[ -r /proc/$outer/task/$outer/children ]] && awk 'NF {print $1; found = 1} END {exit !found}' "/proc/$outer/task/$outer/children"
}

node_lives() { lives "$1" && first_process_of "$1" >/dev/null; }

# Its process 1 takes all others of the namespace with it.
stop_node() {
  local name=$1 pid i
  if pid=$(first_process_of "$name"); then kill -KILL "$pid" 2>/dev/null || true; fi
  for ((i = 0; i < 50; ++i)); do
    lives "$name" || return 0
    sleep 0.1
  done
  kill -KILL "$(<"$lab/run/$name.pid")" 2>/dev/null || true
}

on_node() {
  local name=$1
  shift
  node_lives "$name" || die "$name is switched off"
  SLURM_CONF=$lab/etc/slurm.conf exec nsenter --target "$(first_process_of "$name")" --net --uts --ipc --pid --mount "$@"
}
