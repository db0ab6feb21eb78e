#!/bin/sh
# On every host, at about the same time: HEAD=node1 sh launch/torchrun.sh launch/run.toml
#
# The run goes on while hosts come and go, as long as there are MIN (1) and no more than MAX (4) of them. When a rank or a
# host is lost, those left start again from the last checkpoint, at most three times; when a host joins, all do. With
# global-batch-tokens in the TOML each number of ranks computes the same updates.
# The host that HEAD names must stay. To end the run, send SIGTERM to torchrun on each host: it saves. torchrun's exit code
# is 1 whatever a rank's was, and a rank that ends with another than 0 by itself (75, too) is started again.
#
# The variable: without it no host can join a run that has begun, as those in it do not tell it where they meet, and all end
# after a minute with "wait timeout after 60000ms, keys: …/MASTER_ADDR" (torch 2.13, two hosts, November 2026).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes="${MIN:-1}:${MAX:-4}" --nproc-per-node="${SLOTS:-gpu}" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-endpoint="${HEAD:?the host where all meet}:${PORT:-29400}" --rdzv-id="${RUN:-xlm}" \
  --module xlm_ds.train --config "$1"
