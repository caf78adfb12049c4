"""Every optimizer's state, saved on any layout, is loaded on any other, and training goes on as if nothing had happened."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from core.checkpoint import CheckpointError, load, save
from core.optimizer.emerging_optimizers import list_optimizers
from core.optimizer.registry import entry_of
from tests.support.processes import on_ranks
from tests.support.small_run import Cut, Run, differing, read_plainly
from tests.support.variants import VARIANTS

CUTS: dict[str, Cut] = {
    "one": Cut(),
    "tp2": Cut(tp=2),
    "pp2": Cut(pp=2),
    "dp2": Cut(dp=2),
    "fsdp2": Cut(dp=2, fsdp=True),
    "tp2 dtensor": Cut(tp=2, dtensor=True),
    "tp4": Cut(tp=4),
    "tp2 pp2": Cut(tp=2, pp=2),
    "tp2 dp2": Cut(tp=2, dp=2),
    "tp2 pp2 dp2": Cut(tp=2, pp=2, dp=2),
}
SIZES = (1, 2, 4, 8)
RING = list(zip(CUTS, [*list(CUTS)[1:], "one"], strict=True))
ALL_PAIRS = list(product(CUTS, repeat=2))


def settings_of(name: str, **kwargs: Any) -> dict[str, Any]:
    """What the config of ``name`` is given, with the most unusual of its rules that are tried on all layouts."""
    given = {**VARIANTS.get(name, [{}])[-1], **kwargs}
    return {"optimizer": name, **{f"{name}_{argument}": value for argument, value in given.items()}}


FAMILIES: dict[str, dict[str, Any]] = {
    "elementwise": settings_of("adamw"),
    "factored": settings_of("adafactor", **VARIANTS["adafactor"][0]),
    "norms": settings_of("lamb"),
    "sign": settings_of("lion"),
    "schedule-free": settings_of("schedule_free_adamw"),
    "curvature": settings_of("sophia", estimator="gnb"),
    "stochastic rounding": settings_of("adamw_sr", bf16_stochastic_round=True) | {"dtype": torch.bfloat16},
    "low-rank": settings_of("apollo"),
    "low-rank, orthogonal": settings_of("apollo", **VARIANTS["apollo"][1]),
    "quantized": settings_of("micro_adam"),
    "Kronecker": settings_of("soap", tp_mode="owner"),
    "Kronecker, everywhere": settings_of("shampoo", tp_mode="duplicated"),
    "triangular": settings_of("quad", tp_mode="owner"),
    "library": settings_of("eo_soap", tp_mode="owner"),
    "muon owner": settings_of("muon", tp_mode="owner"),
    "muon distributed": settings_of("muon", tp_mode="distributed"),
    **{
        f"adaptive_muon {method}": settings_of("adaptive_muon", moment2_method=method) | {"muon_tp_mode": "owner"}
        for method in ("adamuon", "normuon", "namo")
    },
}
EVERY = {name: settings_of(name) for name in list_optimizers()} | {"sophia": FAMILIES["curvature"]}
BLOCKWISE = settings_of("adaptive_muon", moment2_method="normuon") | {"muon_tp_mode": "blockwise"}


def make(world: Any, cut: str, settings: Mapping[str, Any], weights: str = "") -> Run:
    only_float32 = getattr(entry_of(settings["optimizer"]).optimizer_cls, "float32_only", False)
    dtype = torch.float32 if only_float32 else torch.float64
    return Run(world, CUTS[cut], {"dtype": dtype} | settings, weights=weights)


def go_on(run: Run, seed: int) -> None:
    torch.manual_seed(seed)
    run.train(2)


def folder_of(folder: Path, cut: str) -> Path:
    return folder / cut.replace(" ", "_")


@contextmanager
def world_of(size: int) -> Iterator[Any]:
    """What a run asks of its ranks; None for one process."""
    if size == 1:
        yield None
        return
    dist.init_process_group("gloo")
    yield SimpleNamespace(mesh=cache(lambda shape, names: init_device_mesh("cpu", shape, mesh_dim_names=names)))
    dist.destroy_process_group()


def here(size: int) -> list[str]:
    return [name for name, cut in CUTS.items() if cut.pp * cut.dp * cut.tp == size]


def wrong(run: Run, wholes: Mapping[str, Tensor]) -> list[str]:
    return differing(run.shards, {key: run.part(wholes[key], key) for key in run.shards})


def save_all(rank: int, size: int, folder: Path, settings: Mapping[str, Any], savers: Iterable[str]) -> None:
    """On every layout of this many ranks: train, save, compare what plain torch reads with memory. One process goes on."""
    with world_of(size) as world:
        for saver in here(size):
            if saver not in savers:
                continue
            run = make(world, saver, settings)
            go_on(run, 1)
            path = save(folder_of(folder, saver), step=2, model_chunks=run.chunks, optimizer=run.optimizer)
            wholes = read_plainly(path)
            assert run.shards.keys() <= wholes.keys()
            assert wrong(run, wholes) == [], saver
            if saver == "one":
                go_on(run, 2)
                save(folder_of(folder, saver), step=4, model_chunks=run.chunks, optimizer=run.optimizer)


def load_all(rank: int, size: int, folder: Path, settings: Mapping[str, Any], pairs: Iterable[tuple[str, str]]) -> None:
    """On every layout of this many ranks: load what others saved, compare with what plain torch reads, go on."""
    expected = read_plainly(folder / "one" / "iter_0000004")
    wholes = cache(lambda saver: read_plainly(folder_of(folder, saver) / "iter_0000002"))
    with world_of(size) as world:
        for loader in here(size):
            run = make(world, loader, settings, "other")
            for saver in [saver for saver, other in pairs if other == loader]:
                run.clear()
                where = folder_of(folder, saver)
                loaded = load(where, step=2, model_chunks=run.chunks, optimizer=run.optimizer)
                assert loaded.rng_restored == (CUTS[saver].mesh == CUTS[loader].mesh)
                assert wrong(run, wholes(saver)) == [], (saver, loader)
                go_on(run, 2)
                for key, mine in run.shards.items():
                    assert_same(mine, run.part(expected[key], key), f"{key}, two steps on, {saver} → {loader}")


def assert_same(got: Tensor, expected: Tensor, what: str) -> None:
    """But for the rounding of sums over other ranks."""
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}.get(got.dtype, 0.0)
    scale = float(expected.abs().double().mean()) if expected.numel() else 0.0
    torch.testing.assert_close(
        got, expected, rtol=tolerance, atol=tolerance * scale, msg=lambda text: f"{what}: {text}"
    )


def check(folder: Path, settings: Mapping[str, Any], pairs: list[tuple[str, str]]) -> None:
    savers = {"one", *(saver for saver, _ in pairs)}
    for size in SIZES:
        if savers & set(here(size)):
            on_ranks(size, save_all, size, folder, settings, savers)
    wholes = read_plainly(folder / "one" / "iter_0000002")
    for saver in savers:
        others = read_plainly(folder_of(folder, saver) / "iter_0000002")
        assert others.keys() == wholes.keys()
        for key, x in others.items():
            assert_same(x, wholes[key], f"{key}, saved on {saver}")
    for size in SIZES:
        if {loader for _, loader in pairs} & set(here(size)):
            on_ranks(size, load_all, size, folder, settings, pairs)


def refuse_blocks(rank: int, size: int, folder: Path) -> None:
    """State of blocks is loaded where the same blocks are, and refused by name everywhere else."""
    with world_of(size) as world:
        for loader in here(size):
            run = make(world, loader, BLOCKWISE, "other")
            before = {key: x.clone() for key, x in run.shards.items()}
            try:
                load(folder / "tp2", model_chunks=run.chunks, optimizer=run.optimizer)
            except CheckpointError as error:
                assert CUTS[loader].tp != 2 or CUTS[loader].dtensor, error
                # Where DTensors cut it, of the same shape, but of other rows.
                assert re.search(r"moment2_buffer\.layers\.0\.fc1\.weight +2 blocks, one a rank", str(error)), loader
                assert differing(run.shards, before) == []
            else:
                assert CUTS[loader].tp == 2
                assert not CUTS[loader].dtensor


def save_blocks(rank: int, folder: Path) -> None:
    with world_of(2) as world:
        run = make(world, "tp2", BLOCKWISE)
        go_on(run, 1)
        save(folder / "tp2", step=2, model_chunks=run.chunks, optimizer=run.optimizer)


def test_state_of_a_block_is_refused_where_blocks_are_others(tmp_path):
    on_ranks(2, save_blocks, tmp_path)
    for size in SIZES[:3]:
        on_ranks(size, refuse_blocks, size, tmp_path)


@pytest.mark.parametrize("family", ["quantized", "Kronecker", "muon owner"])
def test_another_layout_loads_what_one_saved(tmp_path, family):
    check(tmp_path, FAMILIES[family], RING)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_layout_loads_what_any_other_saved(tmp_path, family):
    check(tmp_path, FAMILIES[family], ALL_PAIRS)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_goes_round_the_layouts(tmp_path, name):
    check(tmp_path, EVERY[name], RING)
