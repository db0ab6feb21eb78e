#!/bin/sh
# MASTER_ADDR=node1 sh launch/mpi.sh node1,node2 16 8 launch/run.toml      # hosts, ranks, ranks of a host
#
# mpirun only starts the ranks; what they send each other goes through NCCL or gloo. This is MPICH's and Intel MPI's way.
# With Open MPI: -hosts becomes --host node1:8,node2:8, -genv K V becomes -x K=V, -ppn goes, and the ranks are told by
# OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_LOCAL_RANK.
exec mpirun -hosts "$1" -n "$2" -ppn "$3" -genv WORLD_SIZE "$2" -genv LOCAL_WORLD_SIZE "$3" \
  -genv MASTER_ADDR "${MASTER_ADDR:?the first host}" -genv MASTER_PORT "${MASTER_PORT:-29500}" sh -c \
  'RANK=$PMI_RANK LOCAL_RANK=$MPI_LOCALRANKID exec python -m xlm_ds.train --config "$0"' "$4"
