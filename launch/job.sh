# The body of the batch scripts here, which source it: one rank a GPU, until they are done, have saved, or have failed.
#
#   TENFOLD_PYTHON   of the environment, on every node; default: .venv of the folder it was submitted from, or python3
#   TENFOLD_COPY_TO  a folder on the disk of each node: the shards are copied there first, once
#
# Exit code: that of training. 85 (saved), 86 (hung), 87 (left alone) and ranks that were killed put the job back into
# the queue.
set -uo pipefail

tell() { printf '%s %s\n' "$(date +%T)" "$*"; }
fail() { echo "error: $*" >&2; exit 2; }
shown() { scontrol show job -o "$SLURM_JOB_ID" | grep -o " $1=[^ ]*" | cut -d= -f2; }  # of SLURM's record of this job

if [ -z "${SLURM_JOB_ID:-}" ] || [ -z "${SLURM_SUBMIT_DIR:-}" ]; then
  fail "this is a batch script of SLURM: sbatch $0 [--config FILE] [key=value ...]; on one machine without SLURM: deepspeed framework/train.py --config FILE"
fi
cd "$SLURM_SUBMIT_DIR" || fail "$SLURM_SUBMIT_DIR is not there on $(hostname); submit from a folder that all nodes share"
job=runs/jobs/$SLURM_JOB_ID
# Asked of SLURM: a variable may come from a job that this one was submitted in.
restart=$(shown Restarts)
export SLURM_RESTART_COUNT=${restart:=0}

# From the second start on its own copy of the code, this file included.
if [ "$restart" != 0 ] && [ -f "$job/config.yaml" ] && [ "${BASH_SOURCE[0]}" != "$job/code/launch/job.sh" ]; then
  . "$job/code/launch/job.sh"
  return
fi

run_job() {  # [--config FILE] [key=value ...]
  local python=${TENFOLD_PYTHON:-} code=$job/code logs=$job/logs/$restart arguments=() srun='' code_of
  # Traps and `wait`: a trap comes through while this shell waits for a child in the background, and only then.
  trap 'tell "time is nearly up"; if [ -n "$srun" ]; then kill -USR2 $srun; else end_job 85; fi' USR2
  trap : TERM CONT  # SLURM tells the ranks itself
  if [ -z "$python" ]; then
    if [ -x .venv/bin/python ]; then python=$PWD/.venv/bin/python; else python=python3; fi
  fi
  command -v "$python" >/dev/null || fail "TENFOLD_PYTHON: $python is not there on $(hostname)"
  tell "job $SLURM_JOB_ID, start $((restart + 1)), on $SLURM_JOB_NODELIST; code, configuration and logs in $job"
  "$python" "$(dirname "${BASH_SOURCE[0]}")/begin.py" "$job" "$@" || exit $?
  . "$code/launch/env.sh"
  export PYTHONPATH=$PWD/$code${PYTHONPATH:+:$PYTHONPATH}

  # Said again: a job that was requeued onto fewer nodes still has its old SLURM_NTASKS; srun does not take
  # --cpus-per-task from the job (since 22.05), nor, after sbatch --export=NONE, the environment.
  local nodes=$SLURM_JOB_NUM_NODES per_node=${SLURM_NTASKS_PER_NODE:-1} step=(srun --export=ALL --kill-on-bad-exit=1)
  step+=(--nodes="$nodes" --ntasks=$((nodes * per_node)) --ntasks-per-node="$per_node")
  [ -n "${SLURM_CPUS_PER_TASK:-}" ] && step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
  mapfile -t arguments < <(copy_shards)
  mkdir -p "$logs"
  touch "$logs/rank-0000.log"
  "${step[@]}" --output="$logs/rank-%4t.log" "$python" "$code/framework/train.py" --config "$job/config.yaml" \
    "${arguments[@]}" 2> "$logs/srun.txt" &
  srun=$!
  tail -q -n +1 --follow=name --pid=$srun "$logs/rank-0000.log" "$logs/srun.txt" 2>/dev/null &
  local tail=$!
  while kill -0 $srun 2>/dev/null; do wait $srun; done
  wait $srun  # its exit code, and not that of a trap
  code_of=$?
  wait $tail 2>/dev/null
  # What other ranks met, which the console of rank 0 does not show.
  cat "$logs"/rank-*.log | grep '^error: ' | sort | uniq -c | sort -rn | head -20
  # Whoever left first is the cause: srun's own exit code is the highest of all, those it ended included.
  if [[ $(grep -m 1 -E 'error: .*tasks? [0-9,-]+: ' "$logs/srun.txt") =~ "Exited with exit code "([0-9]+) ]]; then
    code_of=${BASH_REMATCH[1]}
  fi
  end_job "$code_of"
}

copy_shards() {  # prints the keys that change
  local key from name to
  [ -n "${TENFOLD_COPY_TO:-}" ] || return 0
  while IFS=$'\t' read -r key from name; do
    to=$TENFOLD_COPY_TO/$name
    tell "copying $from to $to on every node, where it is not" >&2
    srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c '
      [ -d "$2" ] && exit 0
      partial=$2.$SLURM_JOB_ID
      rm -rf "$partial" && mkdir -p "$(dirname "$2")" && cp -r "$1" "$partial" && mv -T "$partial" "$2" && exit 0
      rm -rf "$partial"
      [ -d "$2" ]  # of another job, meanwhile
    ' copy "$from" "$to" </dev/null >&2 || { tell "not copied: $from is read where it is" >&2; continue; }
    echo "$key=$to"
  done < "$job/shards.tsv"
}

end_job() {  # exit code of the ranks
  case $1 in
    0) tell "done"; exit 0 ;;
    85) tell "saved" ;;
    86) tell "hung (hung-rank*.txt in the run folder say where)" ;;
    87) tell "a rank or its node was lost" ;;
    *) if [ "$1" -le 128 ]; then tell "failed with exit code $1; logs in $job/logs"; exit "$1"; fi
       tell "a rank was killed by signal $(($1 - 128))" ;;
  esac
  # Not a job that SLURM itself is ending: cancelled, it would come back; preempted, SLURM puts it back. And not the
  # next start of this one, where SLURM had lost sight of this script.
  if [ "$(shown JobState)" != RUNNING ] || [ "$(shown Restarts)" != "$restart" ]; then
    tell "SLURM has ended the job"
    exit "$1"
  fi
  tell "back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || exit "$1"
  sleep 60  # SLURM ends this script
  exit "$1"
}
