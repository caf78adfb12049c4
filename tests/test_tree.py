"""The shape of the tree: small files, one direction of imports, one place that communicates, no machine's paths."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for folder in ("core", "tools", "tests") for path in (ROOT / folder).rglob("*.py"))
CORE = [path for path in MODULES if path.is_relative_to(ROOT / "core") and path != ROOT / "core/__init__.py"]
TEXTS = [
    *MODULES,
    *(path for pattern in ("*", ".ci/*", "scripts/*", "configs/*") for path in ROOT.glob(pattern) if path.is_file()),
]
MAX_LINES = 400

# Files and folders of core/. Each may import what stands in the rows above its own.
LAYERS = (
    {"agreement", "engine_environment", "process_groups_config", "ranges", "schedule"},
    {"layout"},
    {"dealing", "exchange", "linalg", "on_matrix", "placements", "random"},
    {"engine_waves", "precision"},
    {"engine"},
    {"cost_model"},
    {"auto_mode", "machine", "state"},
    {"optimizer"},
    {"checkpoint", "faults"},
    {"megatron"},
    {"megatron_hook"},
)
LAYER = {part: row for row, parts in enumerate(LAYERS) for part in parts}

# Group set-up asks who is in which group, links are measured, a checkpoint is agreed on; the rest goes through the engine.
MAY_COMMUNICATE = {"agreement", "engine_waves", "exchange", "machine", "process_groups_config", "checkpoint"}
COMMUNICATION = re.compile(
    r"torch\.distributed\.(distributed_c10d\.)?"
    r"(all_|reduce|broadcast|gather|scatter|send|recv|isend|irecv|barrier|monitored_barrier|batch_isend_irecv"
    r"|nn\b|_functional_collectives\b|_symmetric_memory\b)"
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(path: Path) -> str:
    """The file or folder of core/ that ``path`` belongs to."""
    return path.relative_to(ROOT / "core").parts[0].removesuffix(".py")


def imported_parts(path: Path) -> Iterator[str]:
    """The files and folders of core/ that a module of core/ imports."""
    package = path.relative_to(ROOT).parent.parts  # ("core", "optimizer")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parents = package[: len(package) - node.level + 1]
            targets = [(*parents, *(node.module or alias.name).split(".")) for alias in node.names]
            yield from (target[1] for target in targets)


def full_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of all that is imported absolutely, and of every attribute of it."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                bound[alias.asname or first] = alias.name if alias.asname else first
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in bound:
                yield node.lineno, f"{bound[first]}.{rest}"


def test_files_are_small() -> None:
    long = {name(path): lines for path in MODULES if (lines := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines; one idea a file: {long}"


def test_folders_of_core_are_packages() -> None:
    missing = {name(path.parent) for path in CORE if not (path.parent / "__init__.py").exists()}
    assert not missing, f"without __init__.py a folder is left out of the wheel: {missing}"


def test_dependencies_point_one_way() -> None:
    parts = {part_of(path) for path in CORE}
    assert parts <= LAYER.keys(), f"give {sorted(parts - LAYER.keys())} a row in LAYERS"
    wrong = [
        f"{name(path)} imports {part}"
        for path in CORE
        for part in imported_parts(path)
        if part != part_of(path) and LAYER.get(part, len(LAYERS)) >= LAYER[part_of(path)]
    ]
    assert not wrong, f"LAYERS forbids: {wrong}"


def test_core_imports_itself_by_relative_names_and_nothing_above_it() -> None:
    wrong = [
        f"{name(path)}:{line}: {full}"
        for path in CORE
        for line, full in full_names(ast.parse(path.read_text()))
        if full.split(".")[0] in ("core", "shardstep", "tools", "tests")
    ]
    assert not wrong, f"the wheel gives core another name, and leaves the rest out: {wrong}"


def test_only_the_engine_communicates() -> None:
    wrong = [
        f"{name(path)}:{line}: {full}"
        for path in CORE
        if part_of(path) not in MAY_COMMUNICATE
        for line, full in full_names(ast.parse(path.read_text()))
        if COMMUNICATION.match(full)
    ]
    assert not wrong, f"rules yield requests, and the engine answers them: {wrong}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.distributed as dist\ndist.all_reduce(x)", True),
        ("from torch import distributed\ndistributed.barrier()", True),
        ("from torch import distributed as dist\ndist.isend(x, 1)", True),
        ("import torch\ntorch.distributed.broadcast(x, 0)", True),
        ("from torch.distributed import reduce_scatter_tensor", True),
        ("from torch.distributed._functional_collectives import all_reduce", True),
        ("import torch.distributed as dist\ndist.get_rank(group)", False),
        ("from torch.distributed.tensor import DTensor", False),
        ("import torch.distributed as dist\nlay.all_reduce(x)", False),
    ],
)
def test_communication_is_found(source: str, found: bool) -> None:
    assert any(COMMUNICATION.match(full) for _, full in full_names(ast.parse(source))) == found


def test_no_path_of_a_machine() -> None:
    machine = re.compile(r"(?<![\w.:/])/(?:work|farm|root|tmp|home|Users)/")
    found = [
        f"{name(path)}:{number}"
        for path in TEXTS
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if machine.search(line)
    ]
    assert not found
