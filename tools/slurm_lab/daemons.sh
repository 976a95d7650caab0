# shellcheck shell=bash disable=SC2154  # sourced by tools/slurm-lab, which sets lab and number
# The daemons outside of the nodes: munge, the database, the controller. Each leaves its process id in run/NAME.pid.

# wait_for WHAT COMMAND...: until the command succeeds; 60 seconds at most.
wait_for() {
  local what=$1 end=$((SECONDS + 60))
  shift
  until "$@" >/dev/null 2>&1; do
    if ((SECONDS >= end)); then
      echo "tools/slurm-lab: waited a minute for $what" >&2
      return 1
    fi
    sleep 0.1
  done
}

# start NAME COMMAND...: in the background, free of this shell and of its open files.
start() {
  local name=$1
  shift
  setsid "$@" </dev/null >>"$lab/log/$name" 2>&1 &
  echo $! >"$lab/run/$name.pid"
}

start_munge() {
  (umask 077 && head -c 1024 /dev/urandom >"$lab/etc/munge.key")
  # Munge trusts no directory that others may write to. The origin: nodes without name resolution would stamp 0.0.0.0.
  start munged munged --foreground --force --origin=127.0.0.1 --num-threads=4 --key-file="$lab/etc/munge.key" \
    --socket="$lab/run/munge.socket" --log-file="$lab/log/munge" --pid-file="$lab/run/munged.own.pid" --seed-file="$lab/state/munge.seed"
  wait_for munge munge --no-input --socket="$lab/run/munge.socket"
}

start_database() {
  local data=$lab/state/database socket=$lab/run/mariadb.socket
  mariadb-install-db --no-defaults --auth-root-authentication-method=normal --skip-test-db --user=root --datadir="$data" >"$lab/log/mariadb" 2>&1
  start mariadb mariadbd --no-defaults --user=root --datadir="$data" --socket="$socket" --skip-networking --pid-file="$lab/run/mariadb.own.pid" \
    --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900
  wait_for MariaDB mariadb --no-defaults --user=root --socket="$socket" --execute "CREATE DATABASE IF NOT EXISTS slurm"
  MYSQL_UNIX_PORT=$socket SLURM_CONF=$lab/etc/slurm.conf start slurmdbd slurmdbd -D
  wait_for slurmdbd bash -c "exec 3<>/dev/tcp/$(controller_address)/$(($(controller_port) + 2))"
  SLURM_CONF=$lab/etc/slurm.conf sacctmgr --immediate --quiet add cluster lab >>"$lab/log/slurmdbd" 2>&1 || true   # slurmctld adds it, too
}

start_controller() {
  SLURM_CONF=$lab/etc/slurm.conf start slurmctld slurmctld -D -f "$lab/etc/slurm.conf"
  wait_for slurmctld env SLURM_CONF="$lab/etc/slurm.conf" scontrol ping
}

all_idle() {
  local states
  states=$(SLURM_CONF=$lab/etc/slurm.conf sinfo --noheader --Node --partition=low --format=%T)
  (($(grep -cx idle <<<"$states") == nodes))
}

# Whether run/NAME.pid names a process of this cluster: its arguments or environment name the directory.
lives() {
  local pid
  pid=$(cat "$lab/run/$1.pid" 2>/dev/null) && [[ -n $pid ]] && grep -qaF "$lab" "/proc/$pid/cmdline" "/proc/$pid/environ" 2>/dev/null
}

stop_daemon() {
  local name=$1 pid i
  lives "$name" || return 0
  pid=$(<"$lab/run/$name.pid")
  kill "$pid" 2>/dev/null || true
  for ((i = 0; i < ${2:-50}; ++i)); do
    kill -0 "$pid" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL "$pid" 2>/dev/null || true
}

# All of it is about to be removed, so nobody waits long for a tidy end.
stop_daemons() {
  local name
  for name in slurmctld slurmdbd mariadb munged; do stop_daemon "$name" 20; done
}

show_status() {
  # shellcheck source=/dev/null
  source "$lab/settings"
  local name i
  for name in munged mariadb slurmdbd slurmctld; do
    if [[ -f $lab/run/$name.pid ]]; then lives "$name" && echo "$name lives" || echo "$name is dead: $lab/log/$name"; fi
  done
  for ((i = 1; i <= nodes; ++i)); do node_lives "n$i" || echo "n$i is switched off"; done
  SLURM_CONF=$lab/etc/slurm.conf sinfo --Node --partition=low --format='%N %T %c CPUs %G'
  SLURM_CONF=$lab/etc/slurm.conf squeue
}
