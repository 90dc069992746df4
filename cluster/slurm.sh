#!/usr/bin/env bash
# A Ray cluster inside a Slurm job, one Ray node a machine, which ends with the run. Submit it again and the run resumes.
#   sbatch --nodes=4 --gpus-per-node=8 cluster/slurm.sh train jobs/runs/lora.yaml storage=/shared/ftray scale.workers=32
#SBATCH --job-name=ftray
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
set -euo pipefail

test $# -ge 2 || { echo "usage: sbatch cluster/slurm.sh <command> <file> [key=value …]" >&2; exit 2; }
port=${FTRAY_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts[0]}
address=$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{print $1}'):$port

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$(openssl rand -hex 32)   # of this job alone: other users of the machines have no way in
export RAY_AUTH_TOKEN
export RAY_TMPDIR=${SLURM_TMPDIR:-/tmp}/ray-$SLURM_JOB_ID

srun --nodes=1 --ntasks=1 -w "$head" \
  ray start --head --port="$port" --include-dashboard=false --temp-dir="$RAY_TMPDIR" --block &
nodes=$!
for _ in $(seq 60); do ray status --address "$address" >/dev/null 2>&1 && break; sleep 2; done
if [ "${#hosts[@]}" -gt 1 ]; then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) --exclude="$head" \
    ray start --address="$address" --block &
  nodes="$nodes $!"
fi
# shellcheck disable=SC2064  the ids as they are now
trap "kill $nodes 2>/dev/null || true" EXIT

# A child, so that the notice of Slurm's limit reaches this shell, and through it the run.
RAY_ADDRESS=$address ftray "$@" &
run=$!
trap 'kill -TERM "$run" 2>/dev/null' TERM
wait "$run" && code=0 || code=$?
while kill -0 "$run" 2>/dev/null; do wait "$run" && code=0 || code=$?; done
exit "$code"
