# What the ranks of a job are told beyond SLURM's own variables; sourced by job.sh. Whatever is already set stays.
# docs/slurm.md, The fabric, says what to try where ranks do not reach each other.

# Which network interface: NCCL and gloo take the first that is not loopback, often not the fast one.
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# Without InfiniBand, or with a broken one:  export NCCL_IB_DISABLE=1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# torch would start a thread for every core of the node, in every rank.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
