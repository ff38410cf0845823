#!/usr/bin/env bash
# A run on several nodes of a SLURM cluster:  sbatch launch/slurm.sh CONFIG --workdir=DIRECTORY [flags of rmjax.main...]
#
# To edit: what the cluster calls its partition and account, how many nodes, how many GPUs each has.
#SBATCH --job-name=rmjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1       # one process a node, with all of the node's GPUs
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64        # reading and tokenizing data is what they do
#SBATCH --mem=0                   # all of the node's
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120         # two minutes before the time is up every process is told, and saves
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
##SBATCH --partition=gpu
##SBATCH --account=mine

RESTARTS=${RESTARTS:-50}          # times that the job is put back into the queue, at most
PYTHON=${PYTHON:-python}          # of the environment that has rmjax; the same path on every node
# The workdir must be on a file system that all nodes share. NCCL finds the fastest network by itself; if it does not:
# export NCCL_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5

if (($# < 2)); then
  echo "usage: sbatch launch/slurm.sh CONFIG --workdir=DIRECTORY [flags...]" >&2
  exit 2
fi
config=$1
shift

# By which the processes of this start know each other; srun passes it on.
RMJAX_SECRET=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export RMJAX_SECRET
# A task that fails ends the others itself, and they say which it was: so srun gives them a minute.
srun --kill-on-bad-exit=0 --wait=60 "$PYTHON" -m rmjax.main --config="$config" "$@"
code=$?

# 75: stopped but saved, or a process was lost. 137 and more: one was killed, by the kernel for instance.
if ((code == 75 || code >= 137)) && ((${SLURM_RESTART_COUNT:-0} < RESTARTS)); then
  echo "launch/slurm.sh: code $code, back into the queue (${SLURM_RESTART_COUNT:-0} times so far)"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
