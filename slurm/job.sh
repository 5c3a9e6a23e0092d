# What every batch script does around srun. Sourced: it exports where the ranks meet and defines `finish`.
set +e # as a profile's set-up lines may have it: a failed srun must reach `finish`

# Since Slurm 22.05 srun does not inherit --cpus-per-task: without this every loader worker sits on one core.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# The first node's address as Slurm knows it: its name need not resolve.
_first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol --oneliner show node "$_first" | sed -n 's/.* NodeAddr=\([^ ]*\) .*/\1/p')
# A port of this job and start alone, so that it meets neither another job nor what is left of its last start.
MASTER_PORT=$((20000 + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 10000))
export MASTER_ADDR="${MASTER_ADDR:-$_first}" MASTER_PORT

trap : TERM INT USR2 CONT # preemption signals this shell too; it waits for srun and then decides

# What scontrol calls this job alone: an element of an array has the array's own number, which means all its elements.
_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
_job=${_job:-$SLURM_JOB_ID}

# finish CODE MAX_RESTARTS: end the job, or have Slurm start it again. CODE is srun's (see task.sh). Started again is
# what saved itself (75) and what a signal killed: out of memory, a lost rank. A program error (1), a user's mistake (2)
# and a start that another one replaced (3) are not, nor one that was interrupted (130).
finish() {
  local code=$1 max_restarts=$2 restarts=${SLURM_RESTART_COUNT:-0} state said now
  if ((code == 249)); then exit 130; fi
  if ((code > 200 && code < 250)); then exit $((code - 200)); fi
  if ((code != 75 && code < 128)); then exit "$code"; fi
  for _ in 1 2 3 4 5 6; do # a controller that fails over answers again soon
    state=$(scontrol --oneliner show job "$_job" |
      sed -n 's/.* JobState=\([A-Z_]*\) Reason=\([^ ]*\) .* Restarts=\([0-9]*\) .*/\3 \1 \2/p')
    [ -z "$state" ] || break
    sleep 20
  done
  now=${state%% *} state=${state#* }
  if ((${now:-0} > restarts)); then # this is what a lost node was still at: the job runs elsewhere, or is to
    echo "slurm/job.sh: start $restarts ended with code $code; Slurm is at start $now"
    exit "$code"
  fi
  case $state in
  "RUNNING "* | "SIGNALING "* | "COMPLETING TimeLimit") ;;
  *) # cancelled, which requeueing would undo, or preempted, and Slurm has requeued it already
    echo "slurm/job.sh: ended with code $code; Slurm says $state and decides what becomes of it"
    exit "$code"
    ;;
  esac
  if ((restarts >= max_restarts)); then
    echo "slurm/job.sh: ended with code $code after $restarts restarts, as many as max_restarts allows: not requeued"
    exit "$code"
  fi
  echo "slurm/job.sh: ended with code $code; requeue, restart $((restarts + 1)) of at most $max_restarts"
  if said=$(scontrol requeue "$_job" 2>&1) || [[ $said == *"pending execution"* ]]; then
    sleep 60 # Slurm ends this script
    exit "$code"
  fi
  echo "slurm/job.sh: scontrol requeue: $said"
  exit "$code"
}
