# shellcheck shell=bash disable=SC2154  # sourced by tools/slurm-lab, which sets lab, nodes, cpus, gpus, accounting, number
# The cluster's configuration: etc/ of its directory.

address_of() { echo "10.213.$number.${1#n}"; }
controller_address() { echo "10.213.$number.254"; }
controller_port() { echo $((20000 + 10 * number)); }

write_config() {
  local gres='' socket=$lab/run/munge.socket
  if ((gpus > 0)); then gres="Gres=gpu:h100:$gpus"; fi
  cat >"$lab/etc/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=$(hostname -s)($(controller_address))
SlurmctldPort=$(controller_port)
SlurmdPort=$(($(controller_port) + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its old credentials expire: 120 s by default.
AuthInfo=socket=$socket,cred_expire=5
StateSaveLocation=$lab/state
SlurmdSpoolDir=$lab/spool/%n
SlurmctldPidFile=$lab/run/slurmctld.pid
SlurmdPidFile=$lab/run/slurmd.%n.pid
SlurmctldLogFile=$lab/log/slurmctld
SlurmdLogFile=$lab/log/slurmd.%n
# Of each node its own: the PMIx plugin makes a directory named after the step in it.
TmpFS=$lab/tmp/%n
MpiDefault=none
# No systemd and no cgroups of our own.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
# Nodes may say that they have more than this machine.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SwitchType=switch/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
SlurmdTimeout=20
MinJobAge=3600
ReturnToService=2
SchedulerParameters=batch_sched_delay=1,sched_interval=5,bf_interval=5
NodeName=DEFAULT CPUs=$cpus RealMemory=64000 State=UNKNOWN $gres
$(for ((i = 1; i <= nodes; ++i)); do echo "NodeName=n$i NodeAddr=$(address_of "n$i")"; done)
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=5
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
  # Named, or slurmd looks for a cgroup file system and ends where there is none.
  echo "CgroupPlugin=cgroup/v1" >"$lab/etc/cgroup.conf"
  echo "AutoDetect=off" >"$lab/etc/gres.conf"
  if ((gpus > 0)); then
    # Slurm wants character devices whose names end in their number.
    for ((i = 0; i < gpus; ++i)); do ln -sf /dev/null "$lab/etc/gpu$i"; done
    echo "Name=gpu Type=h100 File=$lab/etc/gpu[0-$((gpus - 1))]" >>"$lab/etc/gres.conf"
  fi
  if [[ $accounting == yes ]]; then write_accounting_config "$socket"; fi
}

write_accounting_config() {
  local socket=$1
  cat >>"$lab/etc/slurm.conf" <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$(controller_address)
AccountingStoragePort=$(($(controller_port) + 2))
AccountingStoragePass=$socket
AccountingStorageTRES=gres/gpu
CONF
  cat >"$lab/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$socket
DbdHost=$(hostname -s)
DbdAddr=$(controller_address)
DbdPort=$(($(controller_port) + 2))
SlurmUser=root
StorageType=accounting_storage/mysql
StorageUser=root
StorageHost=localhost
StorageLoc=slurm
LogFile=$lab/log/slurmdbd
PidFile=$lab/run/slurmdbd.pid
CONF
  chmod 600 "$lab/etc/slurmdbd.conf"
}
