"""The shape of the tree: small files, one direction of imports, one place that communicates, no machine's paths."""

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
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

# Files and folders, the deepest that is named counts. Each may import what stands in the rows above its own, and itself.
LAYERS = (
    {"cache_blocks", "eager", "module_names", "process_groups_config", "serializable", "torch_defaults"},
    {"schedule"},
    {"sharding"},
    {"engine", "philox"},
    {"linalg", "precision"},
    {"cost"},
    {"optimizer.members", "optimizer.param_key"},
    {"optimizer.steps"},
    {"optimizer.rules.parts"},
    {"optimizer.rules"},
    {"optimizer.registry"},
    {"optimizer.optimizer_config"},
    {"optimizer.weight_decay_mask"},
    {"optimizer.routing"},
    {"optimizer"},
    {"optimizer.functional"},
    {"checkpoint", "faults"},
    {"megatron"},
    {"megatron_hook"},
)
LAYER = {part: row for row, parts in enumerate(LAYERS) for part in parts}

# Files of core/optimizer/rules that import another rule: subclasses of its class, or the same rule with another front.
RULES_IMPORT = {
    "adaptive_muon": {"muon", "tensor_parallel_muon"},
    "muon_optax": {"tensor_parallel_muon"},
    "tensor_parallel_muon": {"muon"},
}

# Group set-up asks who is in which group, links are measured, a checkpoint is agreed on; the rest goes through the engine.
MAY_COMMUNICATE = ("core/engine/", "core/checkpoint/", "core/cost/measure.py", "core/process_groups_config.py")
COMMUNICATION = re.compile(
    r"torch\.distributed\.(distributed_c10d\.)?"
    r"(all_|reduce|broadcast|gather|scatter|send|recv|isend|irecv|barrier|monitored_barrier|batch_isend_irecv"
    r"|nn\b|_functional_collectives\b|_symmetric_memory\b)"
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(dotted: Sequence[str]) -> str:
    """The deepest file or folder of LAYERS that a module belongs to, by its names below core/; itself when there is none."""
    names = [".".join(dotted[:n]) for n in range(len(dotted), 0, -1)]
    return next((name for name in names if name in LAYER), names[0])


def dotted(path: Path) -> tuple[str, ...]:
    """Names below core/ of a module of core/."""
    return tuple(path.relative_to(ROOT / "core").with_suffix("").parts)


def imported_parts(path: Path) -> Iterator[str]:
    """The parts of core/ that a module of core/ imports."""
    package = dotted(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parents = package[: len(package) - node.level + 1]
            for alias in node.names:
                target = (*parents, *(node.module or alias.name).split("."))
                deeper = (*target, alias.name)  # ``from . import module``, or a name in a module
                yield part_of(deeper if (ROOT / "core").joinpath(*deeper).with_suffix(".py").exists() else target)


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
    parts = {part_of(dotted(path)) for path in CORE}
    assert parts <= LAYER.keys(), f"give {sorted(parts - LAYER.keys())} a row in LAYERS"
    wrong = [
        f"{name(path)} imports {part}"
        for path in CORE
        for part in imported_parts(path)
        if part != part_of(dotted(path)) and LAYER.get(part, len(LAYERS)) >= LAYER[part_of(dotted(path))]
    ]
    assert not wrong, f"LAYERS forbids: {wrong}"


def test_rules_import_each_other_only_as_listed() -> None:
    rules = ROOT / "core/optimizer/rules"
    pairs = {
        (path.stem, target)
        for path in rules.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for target in ([node.module.split(".")[0]] if node.module else [alias.name for alias in node.names])
        if (rules / f"{target}.py").exists()
    }
    listed = {(file, target) for file, targets in RULES_IMPORT.items() for target in targets}
    assert pairs == listed, (
        "move what two rules share to rules/parts, or list a subclass and its parent in RULES_IMPORT"
    )


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
        if not name(path).startswith(MAY_COMMUNICATE)
        for line, full in full_names(ast.parse(path.read_text()))
        if COMMUNICATION.match(full)
    ]
    assert not wrong, f"rules yield requests, and the engine answers them: {wrong}"


FAMILIES = {
    ("adaptive_muon", "muon"),
    ("adaptive_muon", "tensor_parallel_muon"),
    ("muon_optax", "tensor_parallel_muon"),
    ("tensor_parallel_muon", "muon"),
}
"""Files of core/optimizer/rules that import another one there: a class and the rule or the class it is built on."""


def test_a_rule_imports_no_other_rule() -> None:
    folder = ROOT / "core/optimizer/rules"
    imports = {
        (path.stem, node.module)
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        and node.level == 1
        and node.module
        and (folder / f"{node.module}.py").exists()
    }
    assert imports == FAMILIES, f"what rules share stands in rules/parts or steps: {imports ^ FAMILIES}"


def test_every_module_is_named_once_in_the_architecture() -> None:
    section = (ROOT / "ARCHITECTURE.md").read_text().partition("## Files")[2].partition("\n## ")[0]
    named = Counter(path.rpartition("/")[2] for path in re.findall(r"`([\w/]+\.py)`", section))
    there = Counter(
        path.name for path in MODULES if path.is_relative_to(ROOT / "core") or path.is_relative_to(ROOT / "tools")
    )
    for name in ("__init__.py", "__main__.py"):
        del named[name], there[name]
    assert named - there == Counter() == there - named, f"not in the tree: {named - there}; not named: {there - named}"


def test_no_test_is_imported() -> None:
    wrong = [
        f"{name(path)}:{line}: {full}"
        for path in MODULES
        for line, full in full_names(ast.parse(path.read_text()))
        if full.startswith("tests.test_")
    ]
    assert not wrong, f"what tests share stands in tests/support: {wrong}"


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
