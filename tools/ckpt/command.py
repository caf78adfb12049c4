"""Inspects, verifies, compares, reshards and converts checkpoints, in one process, without a GPU; executes nothing in them.

    python -m tools.ckpt inspect DIR --keys 'model.*'
    python -m tools.ckpt verify DIR --all
    python -m tools.ckpt diff A B --values
    python -m tools.ckpt reshard SRC DST --files 8
    python -m tools.ckpt convert model.pt DST --from torch
    python -m tools.ckpt convert DIR model.pt --to torch
    python -m tools.ckpt convert MEGATRON_DIR DST --from megatron
    python -m tools.ckpt convert DIR DST --to megatron

DIR is the directory of --save, for its newest checkpoint or that of --step, or one iter_... folder. Exit code 0: done, nothing
wrong; 1: damaged, refused or different; 2: the command was wrong.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch.distributed.checkpoint.metadata import MetadataIndex

from core.checkpoint import CheckpointError
from core.checkpoint.compare import selection
from core.checkpoint.contents import base_of

from ..pretrain.report import format_rows
from ..usage import UsageError, refuse
from .diff import keys, manifest_rows, objects, values
from .megatron import LAYERS, WEIGHTS, from_megatron, to_megatron
from .source import Source, find, open_source
from .torch_file import from_torch, to_torch
from .writer import Writer

WRONG = 1
"""Exit code for a checkpoint that is damaged, refused or different."""
MOST_FILES = 1024
"""Largest number of files to write, which are all open at the same time."""


def inspect(options: argparse.Namespace) -> int:
    """Show the manifest of a checkpoint and a table of its tensors."""
    source = open_source(options.dir, options.step)
    manifest, tensors = source.manifest, source.reader.tensors()
    wanted = selection(tensors, options.keys) if options.keys else tensors
    if not wanted:
        raise UsageError(
            "--keys", " ".join(options.keys), "no key matches", possible=f"keys like {next(iter(tensors), '')}"
        )
    optimizers = {
        g.optimizer: sum(len(h.parameters) for h in manifest.groups if h.optimizer == g.optimizer)
        for g in manifest.groups
    }
    facts = [
        ("folder", str(source.folder)),
        ("step", f"{manifest.step}, {manifest.consumed_samples} samples"),
        ("layout", _layout(source)),
        ("optimizers", ", ".join(f"{name} ({count} parameters)" for name, count in optimizers.items()) or "none"),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
        ("format", str(manifest.format)),
        ("config", manifest.config),
        ("bytes", f"{sum(manifest.files.values()):,} in {len(manifest.files)} files"),
    ]
    print("\n".join(format_rows(facts)))
    storage = source.reader.read_metadata().storage_data
    rows = [("key", "dtype", "whole shape", "bytes", "boxes", "files")]
    for key, x in wanted.items():
        places = [storage[MetadataIndex(key, chunk.offsets)] for chunk in x.chunks]
        names = {place.relative_path for place in places}
        dtype, shape = str(x.properties.dtype)[6:], " x ".join(map(str, x.size)) or "scalar"
        size = x.size.numel() * x.properties.dtype.itemsize
        rows.append((key, dtype, shape, f"{size:,}", str(len(places)), str(len(names))))
    print("\n".join(["", *format_rows(rows), f"{len(wanted)} of {len(tensors)} tensors"]))
    if objects := source.reader.objects():
        first = ", ".join(objects[:3]) + (f" and {len(objects) - 3} more" if len(objects) > 3 else "")
        print(f"not tensors, and not read by this package: {first}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check the size and SHA-256 of every file, of the newest checkpoint or of all checkpoints."""
    folders = find(options.dir, options.step)
    code = 0
    for folder in folders if options.all else folders[:1]:
        try:
            source = open_source(str(folder))
            wrong = source.verify()
        except CheckpointError as damage:
            print(f"{folder}: {damage}")
            code = WRONG
            continue
        for name in wrong:
            print(f"{folder / name}: its contents are not what was written")
        if wrong:
            code = WRONG
        else:
            size = sum(source.manifest.files.values())
            print(f"{folder}: {len(source.digests)} files, {size:,} bytes, as they were written")
    return code


def diff(options: argparse.Namespace) -> int:
    """Show what differs between two checkpoints."""
    a, b = (open_source(path, options.step) for path in (options.a, options.b))
    rows = [*manifest_rows(a.manifest, b.manifest), *keys(a, b)]
    if rows:
        print("\n".join(format_rows([("", "in A", "in B"), *rows])))
    differ = bool(rows)
    if options.values:
        distances = values(a, b)
        unequal = [d for d in distances if not d.equal]
        if unequal:
            table = [(d.key, f"{d.largest:.3e}", f"{d.relative:.3e}") for d in unequal]
            print("\n".join(format_rows([("values of", "largest difference", "relative"), *table])))
        changed = objects(a, b)
        print("".join(f"{key}, which is not a tensor, is not stored alike\n" for key in changed), end="")
        print(f"{len(distances) - len(unequal)} of {len(distances)} tensors that both have are equal, bit for bit")
        differ = differ or bool(unequal) or bool(changed)
    elif not differ:
        print("no difference in settings, keys, dtypes and shapes; values were not compared (--values)")
    return WRONG if differ else 0


def reshard(options: argparse.Namespace) -> int:
    """Write a checkpoint with its tensors cut over files for parallel reading; one tensor is in memory at a time."""
    source = open_source(options.src, options.step).verified()
    with Writer(options.dst, source.manifest.step, options.files) as writer:
        for key in source.reader.tensors():
            writer.add(key, source.reader.whole(key))
        for key in source.reader.objects():
            writer.add_raw(key, source.reader.raw(key))
        made = writer.commit(replace(source.manifest, files={}))
    print(f"wrote {made}: {len(source.reader.tensors())} tensors over {options.files} files")
    _say_what_stays(source)
    return 0


def convert(options: argparse.Namespace) -> int:
    """Convert a checkpoint from another format, or to one."""
    notes: list[str] = []
    if options.source:
        if options.layers or options.weights:
            raise UsageError("--layers, --weights", None, "belong to --to megatron")
        if options.source == "torch":
            made, notes = from_torch(Path(options.src), options.dst, options.files)
        else:
            made, notes = from_megatron(options.src, options.step, options.dst, options.files)
    else:
        source = open_source(options.src, options.step).verified()
        if options.to == "torch":
            made = Path(options.dst)
            left_out = to_torch(source, made)
            notes = [f"left out, since torch has no place for it: {', '.join(left_out)}"] if left_out else []
        else:
            made, notes = to_megatron(source, options.dst, options.layers, options.weights, options.files)
    print("\n".join([f"wrote {made}", *notes]))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Raises:
        SystemExit: with code 2, for a command that cannot be run.
    """
    options = _parser().parse_args(argv)
    try:
        code: int = options.run(options)
    except UsageError as error:
        refuse(error, rank=0, program="ckpt")
    except CheckpointError as error:
        print(f"ckpt: error: {error}", file=sys.stderr)
        return WRONG
    except BrokenPipeError:  # a pager was closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return WRONG
    except (MemoryError, RecursionError) as error:
        what = (
            "not enough memory for the largest tensor"
            if isinstance(error, MemoryError)
            else "nested too deeply to be real"
        )
        print(f"ckpt: error: {what}", file=sys.stderr)
        return WRONG
    return code


def _layout(source: Source) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in source.manifest.layout.items())


def _say_what_stays(source: Source) -> None:
    keys = source.reader.tensors()
    if any(key.startswith("rng/") for key in keys):
        layout = _layout(source)
        print(
            f"random number generators are restored only on the layout that saved, {layout}; carried over as they are"
        )
    if blocks := {base_of(key)[1] for key in keys} - {0}:
        sizes = ", ".join(map(str, sorted(blocks)))
        print(
            f"state of blockwise mode still loads only at the tensor-parallel size that saved, {sizes}; carried over as it is"
        )


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tools.ckpt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = made.add_subparsers(required=True, metavar="COMMAND")

    def command(run: object, *names: str, files: bool = False) -> argparse.ArgumentParser:
        name, text = run.__name__, run.__doc__  # type: ignore[attr-defined]
        one = commands.add_parser(name, help=text, description=text)
        for positional in names:
            one.add_argument(positional, metavar=positional.upper())
        one.add_argument("--step", type=_steps, metavar="N", help="the checkpoint of this step, not the newest")
        if files:
            one.add_argument("--files", type=_files, default=1, metavar="N", help="files to cut the tensors over")
        one.set_defaults(run=run)
        return one

    one = command(inspect, "dir")
    one.add_argument(
        "--keys", action="append", default=[], metavar="PATTERN", help="only these; * is any text; repeatable"
    )
    command(verify, "dir").add_argument("--all", action="store_true", help="not only the newest")
    command(diff, "a", "b").add_argument(
        "--values", action="store_true", help="compare tensors too, two in memory at a time"
    )
    command(reshard, "src", "dst", files=True)
    one = command(convert, "src", "dst", files=True)
    way = one.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="source", choices=("torch", "megatron"), help="SRC is in this format")
    way.add_argument("--to", choices=("torch", "megatron"), help="DST will be")
    one.add_argument(
        "--layers", choices=LAYERS, help="in one tensor, or with keys of their own (default: as they came)"
    )
    one.add_argument("--weights", choices=WEIGHTS, help="of the job that is to load it (default: as they came)")
    return made


def _files(text: str) -> int:
    files = _steps(text)
    if not 1 <= files <= MOST_FILES:
        raise argparse.ArgumentTypeError(f"{text} is out of range; possible: 1 to {MOST_FILES}")
    return files


def _steps(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)
