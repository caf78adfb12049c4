"""The library examples of the README run as they stand."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.mpi(min_size=2)
def test_examples_run(world, monkeypatch):
    monkeypatch.setattr(dist, "init_process_group", lambda backend: None)
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(compile(code, "README.md", "exec"), names)
    assert [a.optimizer for a in names["optimizer"].assignments()].count("muon") == 2
    assert torch.isfinite(names["weight"]).all()
