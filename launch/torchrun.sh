#!/bin/sh
# On every host, at about the same time: HEAD=node1 sh launch/torchrun.sh launch/run.toml
#
# The run goes on while hosts come and go, as long as there are MIN (1) and no more than MAX (4) of them. When a rank or a
# host is lost, those left start again from the last checkpoint, at most three times; when a host joins, all do. With
# global-batch-tokens in the TOML each number of ranks computes the same updates.
# torchrun's exit code is 1 whatever a rank's was (also 75 and 2).
exec torchrun --nnodes="${MIN:-1}:${MAX:-4}" --nproc-per-node="${SLOTS:-gpu}" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29400}" --rdzv-id="${RUN:-xlm}" \
  --module xlm_ds.train --config "$1"
