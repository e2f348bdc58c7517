#!/usr/bin/env bash
# A recipe on two machines of a Slurm cluster:
#
#     sbatch recipes/accelerate/slurm.sh fsdp2_two_nodes recipes/sft.py recipes/configs/sft_tiny.yaml [--field value ...]
#
# One launcher per machine; each is told which machine it is and where the first one listens. A job that is stopped goes
# on from its last checkpoint when it is submitted again with --resume_from_checkpoint latest.
#SBATCH --job-name=sleepify
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# The trainer writes a checkpoint when it is told to stop.
#SBATCH --signal=TERM@120
set -euo pipefail

launch=$1
shift
# Slurm runs a copy of this file from elsewhere.
cd "${SLURM_SUBMIT_DIR:-.}"
MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 20000))
export MAIN PORT

# --kill-on-bad-exit: without it the machines that are left would wait for the one that is not.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file "recipes/accelerate/$0.yaml" \
        --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-8}))" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN" --main_process_port "$PORT" "$@"
' "$launch" "$@"
