"""What a save writes, and that a run resumed on the same layout goes on bit for bit."""

import random
from math import prod

import numpy as np
import pytest
import torch

from core.checkpoint import load, save
from core.checkpoint.reader import SafeReader
from tests.support.small_run import CUTS, Run, differing, read_plainly, shared

OPTIMIZERS = {
    "adamw": {"optimizer": "adamw"},
    "muon owner": {"optimizer": "muon", "muon_tp_mode": "owner"},
    "adaptive_muon adamuon": {"optimizer": "adaptive_muon", "adaptive_muon_moment2_method": "adamuon"},
}


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("cut", ["copies", "pp2 tp2"])
def test_copies_are_written_once(world, tmp_path, cut):
    run = Run(world, CUTS[4][cut], OPTIMIZERS["adamw"])
    path = save(shared(tmp_path), step=1, model_chunks=run.chunks, optimizer=run.optimizer)
    metadata = SafeReader(path).read_metadata()
    wholes = read_plainly(path)
    assert all(key in wholes for key in run.shards)
    for key, x in wholes.items():
        chunks = metadata.state_dict_metadata[key].chunks
        assert sum(prod(chunk.sizes) for chunk in chunks) == x.numel(), key
    described = sum(info.length for info in metadata.storage_data.values())
    assert described == sum(file.stat().st_size for file in path.glob("*.distcp"))


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("optimizer", ["muon owner", "adaptive_muon adamuon"])
@pytest.mark.parametrize("cut", ["tp2 dp2", "pp2 tp2 dtensor"])
def test_the_same_layout_goes_on_bit_for_bit(world, tmp_path, cut, optimizer):
    torch.manual_seed(1)
    run = Run(world, CUTS[4][cut], OPTIMIZERS[optimizer])
    run.train(2)
    folder = shared(tmp_path)
    save(folder, step=2, model_chunks=run.chunks, optimizer=run.optimizer)
    run.train(2)
    drawn = random.random(), np.random.rand()

    torch.manual_seed(world.rank)
    again = Run(world, CUTS[4][cut], OPTIMIZERS[optimizer], weights="other")
    assert load(folder, model_chunks=again.chunks, optimizer=again.optimizer).rng_restored
    again.train(2)
    assert differing(again.shards, run.shards) == []
    assert (random.random(), np.random.rand()) == drawn
