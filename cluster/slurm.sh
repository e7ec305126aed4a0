#!/usr/bin/env bash
# A Ray cluster inside one Slurm allocation, and a run on it:
#
#     sbatch cluster/slurm.sh configs/gemma-2-9b.yaml run_dir=/scratch/$USER/gemma-2-9b
#
# One Ray process a node; run_dir must be on a file system that all nodes share. A job that hits its time limit is
# submitted again with the same arguments and goes on where it stopped.
#SBATCH --job-name=rayinterp
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source .venv/bin/activate

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a node
address="$(srun --nodes=1 --ntasks=1 -w "$head" hostname --ip-address | awk '{print $1}'):$port"

# Ray listens on the machine room's network: without a token, whoever reaches it may run code as this job's owner.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN="$(python -c 'import secrets; print(secrets.token_hex(32))')"
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # not inherited by steps since Slurm 22.05
start=(--block --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}")
srun --nodes=1 --ntasks=1 -w "$head" ray start --head --port="$port" --dashboard-host=127.0.0.1 "${start[@]}" &
deadline=$((SECONDS + 300))
until ray status --address="$address" >/dev/null 2>&1; do
    if ! kill -0 $! 2>/dev/null || ((SECONDS > deadline)); then
        echo "no Ray head on $head at port $port" >&2
        exit 1
    fi
    sleep 2
done
for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 -w "$node" ray start --address="$address" "${start[@]}" &
done

RAY_ADDRESS="$address" python jobs/run.py "$@"
