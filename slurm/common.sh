# shellcheck shell=bash
# What the batch scripts here share. Each of them is a head of #SBATCH lines and a call of train, below, or of launch.
set -uo pipefail

# Asks the program to save and to leave with code 75; run.signal of the run file. When it comes is the scripts' --signal line.
signal=USR2

say() { echo "== $*"; }
leave() { say "$2"; exit "$1"; }

slurm_folder=$(dirname "${BASH_SOURCE[0]}")
if [[ -f $slurm_folder/site.env ]]; then
  bash -n "$slurm_folder/site.env" || leave 2 "$slurm_folder/site.env is no shell script, see above"
  # shellcheck source=/dev/null
  source "$slurm_folder/site.env" job
else
  say "no $slurm_folder/site.env: no modules, and srun --mpi=pmix; to change that: cp $slurm_folder/site.env.example $slurm_folder/site.env"
fi

# The program: $UPCYCLE, else a clone's, a bundle's, or the installed one.
read -ra upcycle <<<"${UPCYCLE:-$(PATH=$PWD/build:$PWD:$PATH command -v upcycle)}"
((${#upcycle[@]})) || leave 2 "no upcycle in $PWD/build, $PWD or PATH: name it as UPCYCLE in $slurm_folder/site.env"
command -v "${upcycle[0]}" >/dev/null || leave 2 "UPCYCLE=${upcycle[*]}: there is no ${upcycle[0]} on $(hostname)"

# The last element of an array has the array's own number: to requeue SLURM_JOB_ID there would start all elements again.
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
# A life: a start of this job, or of its chain of jobs, counted from 0.
life=$((${UPCYCLE_CHAIN_LIFE:-0} + ${SLURM_RESTART_COUNT:-0}))
chain=${UPCYCLE_CHAIN:-$job}

# One task for each GPU, unless tasks were asked for.
tasks=${SLURM_NTASKS:-$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-1}))}
cpus=${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE * SLURM_NNODES / tasks))}
((cpus > 0)) || cpus=1

# Slurm sends $signal before the time limit, to this shell alone (--signal=B:...), which passes it on. TERM comes with scancel, at the time
# limit and at the end of a preemption's grace: the ranks have it too, and Slurm decides what becomes of the job.
launcher='' watcher='' asked=no ended=no checking=no
# The check is let finish: it is short, and what it refuses is to be refused, however early the signal comes.
trap 'asked=yes; [[ $checking == yes ]] || pass_on' USR1 USR2
trap 'ended=yes; pass_on' TERM
pass_on() { [[ -z $launcher ]] || kill "-$signal" "$launcher" 2>/dev/null; }
alive() { [[ -n $1 ]] && kill -0 "$1" 2>/dev/null; }

# What a save has to fit into, for the check: how long before the time limit the signal comes, by the script's line or the site's setting
# (sbatch's own --signal is not told to a job), and when the limit is, which newer Slurms say themselves.
lead=${SBATCH_SIGNAL:-$(sed -n 's/^#SBATCH --signal=//p' "$0" | tail -n 1)}
lead=${lead##*@}
[[ $lead =~ ^[1-9][0-9]*$ ]] || lead=''
if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then
  end=$(squeue --noheader --jobs="$job" --format=%e 2>/dev/null)
  if [[ -n $end ]] && end=$(date --date="$end" +%s 2>/dev/null); then export SLURM_JOB_END_TIME=$end; fi
fi

# launch COMMAND ARGUMENTS...: on all tasks. In the background, because bash runs no trap while it waits for a command in the foreground.
launch() {
  local start
  case ${UPCYCLE_LAUNCHER:-srun} in
    # srun inherits no --cpus-per-task. A dead rank must end the step, or the others wait for it.
    srun) start=(env -u SLURM_CPUS_PER_GPU srun "--mpi=${UPCYCLE_MPI:-pmix}" "--nodes=$SLURM_NNODES" "--ntasks=$tasks"
                 "--cpus-per-task=$cpus" --kill-on-bad-exit=1 --wait=60) ;;
    mpirun) start=(mpirun -np "$tasks" --map-by "ppr:$(((tasks + SLURM_NNODES - 1) / SLURM_NNODES)):node" --bind-to none) ;;
    *) leave 2 "UPCYCLE_LAUNCHER=$UPCYCLE_LAUNCHER: srun or mpirun" ;;
  esac
  "${start[@]}" "${upcycle[@]}" "$@" &
  launcher=$!
}

# Waits for what launch started: its status in $rc, yes in $hung if the watch has ended it.
finish() {
  hung=no
  while alive "$launcher"; do
    if [[ -z $watcher ]]; then
      wait "$launcher"
    else
      wait -n "$launcher" "$watcher"
      alive "$watcher" && continue
      # TERM to srun kills the step; the ranks do not see it.
      if wait "$watcher"; (($? == 1)); then hung=yes && kill -TERM "$launcher"; fi
      watcher=''
    fi
  done
  wait "$launcher"
  rc=$?
  launcher=''
  if alive "$watcher"; then kill "$watcher" && wait "$watcher"; fi 2>/dev/null
  watcher=''
}

newest_checkpoint() {
  local steps
  steps=("$run"/checkpoints/step-????????)
  [[ -d ${steps[-1]} ]] && echo "${steps[-1]##*/}" || echo none
}

# The file `lives` of the run directory: the job, its newest checkpoint, and the first life that began with it.
count_lives() {
  local of='' last='' first=0
  newest=$(newest_checkpoint)
  since=$life
  if [[ -f $run/lives ]]; then read -r of last first <"$run/lives"; fi
  if [[ $newest == none ]]; then since=0; elif [[ $of == "$chain" && $last == "$newest" ]]; then since=$first; fi
  if [[ -f $run/run.toml ]]; then echo "$chain $newest $since" >"$run/lives"; fi
  ((life - since < 3)) || leave 1 "the last three lives have left $newest the newest checkpoint of $run: not started again"
}

# train SCRIPT RUN.toml [--set key=value ...]: one life of a run. SCRIPT is what a chain submits.
train() {
  printf -v resubmit ' %q' sbatch "--nodes=$SLURM_NNODES" "$@"
  local script=$1
  shift
  "${upcycle[@]}" check --files-only "$@" || leave 2 "nothing was started"
  run=$("${upcycle[@]}" check --print run.directory "$@") || exit
  say "job $job, life $life: $tasks ranks of $cpus CPUs on $SLURM_JOB_NODELIST, in $run: ${upcycle[*]} train $*"
  count_lives
  queue_successor "$script" "$@"

  check "$@"
  if ((rc == 2)); then drop_successor; leave 2 "the pre-flight check failed: nothing was started"; fi
  if [[ $asked$ended == *yes* ]]; then
    say "asked to leave before training began"
    rc=75
  else
    if ((rc != 0)); then drop_successor; leave "$rc" "the pre-flight check could not run, three times (code $rc): nothing was started"; fi
    train_on "$@"
  fi
  conclude
}

# The pre-flight check. UPCYCLE_CHECK=off: none. Up to three times if it can't run: its ranks could not start, or one of them did not come, which
# it then says.
check() {
  local try
  rc=0
  [[ ${UPCYCLE_CHECK:-} != off ]] || return 0
  checking=yes
  for try in 1 2 3; do
    # Words, on purpose: several options in one setting.
    # shellcheck disable=SC2086
    launch check "$@" ${lead:+--save-within "$lead"} ${UPCYCLE_CHECK:-}
    finish
    if ((try == 3 || rc == 0 || rc == 2)) || [[ $asked$ended == *yes* ]]; then break; fi
    say "the pre-flight check could not run (code $rc): once more"
  done
  checking=no
}

# The training step. Up to four times if no rank came as far as its first heartbeat: on a node that has crashed, Slurm's PMIx plugin trips over
# a socket that the same step of an earlier life has left (srun may even say 0), and now and then it lets a rank out of MPI_Init before another
# has got that far, which Open MPI answers with a null call in btl_tcp (cbfunc not registered; open-mpi/ompi issue 12495 reports the like).
train_on() {
  local try beat
  for try in 1 2 3 4; do
    beat=$(first_heartbeat)
    launch train "$@"
    if [[ ${UPCYCLE_WATCH:-} != off ]]; then
      # shellcheck disable=SC2086
      "${upcycle[@]}" watch "$run" ${UPCYCLE_WATCH:---start 1800 --step 900 --checkpoint 1800} &
      watcher=$!
    fi
    finish
    if ((try == 4 || rc == 2 || rc == 75)) || [[ $asked$ended$hung == *yes* || $(first_heartbeat) != "$beat" || -f $run/finished ]]; then return; fi
    say "code $rc, and no rank has begun: once more"
  done
}

first_heartbeat() { cat "$run/heartbeat/rank_00000" 2>/dev/null; }

# What becomes of the job. Its state is the script's last status.
conclude() {
  if ((rc == 0)) && [[ -f $run/finished ]]; then drop_successor; leave 0 "done: $(<"$run/finished")"; fi
  if ((rc == 0)); then say "code 0, but no $run/finished: a node was lost, or a rank"; rc=75; fi
  if [[ $ended == yes ]]; then leave "$rc" "code $rc after TERM: Slurm ends this job (scancel, time limit or preemption), and it alone starts it again"; fi
  if [[ -e $run/stop ]]; then drop_successor; leave "$rc" "$run/stop is there: not started again; remove it and submit to go on"; fi
  if [[ $hung == yes ]]; then
    say "it hung: the watch has ended it, and says above whom it waited for"
    if [[ $(cat "$run/hung" 2>/dev/null) == "$chain" ]]; then drop_successor; leave 1 "a second hang: not started again"; fi
    echo "$chain" >"$run/hung"
  # 137: ranks were killed, which srun also says when one left with 75 a moment before the others; more than 128 after the signal: it came
  # before a rank could take it.
  elif ((rc != 75 && rc != 137)) && ! { [[ $asked == yes ]] && ((rc > 128)); }; then
    drop_successor
    leave "$rc" "code $rc: failed"
  fi
  if [[ $(newest_checkpoint) == "$newest" ]] && ((life + 1 - since >= 3)); then
    drop_successor
    leave "$((rc ? rc : 1))" "code $rc, and no newer checkpoint than $newest in three lives: not started again"
  fi
  [[ -z $successor ]] || leave 75 "code $rc: job $successor goes on"
  if scontrol requeue "$job"; then leave 0 "code $rc: back into the queue"; fi
  leave 75 "code $rc: saved, but not back in the queue (see scontrol's message above); submit it again:$resubmit"
}

# UPCYCLE_RESTART=chain: the next job waits from the beginning, so that no kind of end can break the chain.
queue_successor() {
  successor=''
  [[ ${UPCYCLE_RESTART:-requeue} == chain ]] || return 0
  local options=("--dependency=singleton" "--job-name=$SLURM_JOB_NAME" "--nodes=$SLURM_NNODES" "--partition=$SLURM_JOB_PARTITION")
  options+=("--time=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%l)")
  [[ -z ${SLURM_JOB_ACCOUNT:-} ]] || options+=("--account=$SLURM_JOB_ACCOUNT")
  [[ -z ${SLURM_GPUS_PER_NODE:-} ]] || options+=("--gpus-per-node=$SLURM_GPUS_PER_NODE")
  [[ -z ${SLURM_NTASKS_PER_NODE:-} ]] || options+=("--ntasks-per-node=$SLURM_NTASKS_PER_NODE")
  successor=$(UPCYCLE_CHAIN=$chain UPCYCLE_CHAIN_LIFE=$((life + 1)) sbatch --parsable "${options[@]}" "$@") ||
    say "sbatch does not work here: submit again what follows this job"
}

drop_successor() { [[ -z $successor ]] || scancel "$successor"; }
