#!/usr/bin/env bash
# Sets everything up and trains the main job on TP 2 x PP 2. Further flags of tools.pretrain may follow:
#   bash train.sh --train-iters 100
# NPROC_PER_NODE gives another number of ranks, for another layout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash scripts/bootstrap.sh plot

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A restarted job would dial the dead ports of the store that it shares with the launcher.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec .venv/bin/python -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "${NPROC_PER_NODE:-4}" \
    -m tools.pretrain --config configs/muon_tp2_pp2.yaml "$@"
