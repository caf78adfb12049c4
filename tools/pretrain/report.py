"""What a run prints and logs: the start-up table, a line or a bar for each step, ``log.csv`` and ``log.jsonl``."""

import csv
import json
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tqdm import tqdm

from core.optimizer.chained import Assignment

_BAR = "{n_fmt}/{total_fmt} |{bar}| {desc} | eta {remaining}"


@dataclass(frozen=True)
class Record:
    """One logged step.

    Args:
        step: Number of finished steps.
        samples: Sequences consumed since the beginning of the training, over all ranks.
        loss: Mean loss over the global batch.
        lr: Learning rate of the step.
        grad_norm: Global gradient norm before clipping.
        tokens_per_s: Speed over all ranks since the last logged step.
        val_loss: Mean loss of the validation after this step; None if there was no validation.
        skipped: Steps left out since the beginning of the training.
    """

    step: int
    samples: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    val_loss: float | None = None
    skipped: int = 0


def startup_table(assignments: Iterable[Assignment]) -> str:
    """A table of the parameters: count, optimizer, whole shape, sharding, mode and why; layer numbers are folded into ``*``.

    Args:
        assignments: Assignments of all ranks; the same parameter may occur several times.
    """
    unique = {a.name: a for a in assignments}
    rows = Counter(
        (re.sub(r"\.\d+\.", ".*.", a.name), a.optimizer, " x ".join(map(str, a.shape)), a.sharding, a.mode, a.reason)
        for a in unique.values()
    )
    head = ("parameter", "count", "optimizer", "whole shape", "sharded", "mode", "why")
    lines = format_rows([head, *((key[0], str(count), *key[1:]) for key, count in rows.items())])
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], f"{len(unique)} parameters"])


def format_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns, two spaces apart."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


class RunLog:
    """``log.csv`` and ``log.jsonl`` of one run: a row for each logged step, on disk as soon as it is written.

    Args:
        directory: Directory of the two files, made if missing; files of an earlier run are replaced. None: nothing is written.
        resumed_at: Finished steps at the start. Rows up to this step are kept; later ones, left by a crashed run, are dropped.
    """

    def __init__(self, directory: Path | None, resumed_at: int = 0) -> None:
        self._files: tuple[Path, Path] | None = None
        if directory is None:
            return
        self._files = (directory / "log.csv", directory / "log.jsonl")
        directory.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_log(directory) if record.step <= resumed_at] if resumed_at else []
        with self._files[0].open("w", newline="") as file:
            csv.writer(file).writerow(field.name for field in fields(Record))
        self._files[1].write_text("")
        for record in kept:
            self.write(record)

    def write(self, record: Record) -> None:
        """Append one row to both files."""
        if self._files is None:
            return
        row = asdict(record)
        with self._files[0].open("a", newline="") as file:
            csv.writer(file).writerow("" if value is None else value for value in row.values())
        with self._files[1].open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_log(run: Path) -> list[Record]:
    """The rows of ``log.jsonl`` in the directory ``run``, or of the file ``run``, up to an incomplete line."""
    path = run / "log.jsonl" if run.is_dir() else run
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(Record(**json.loads(line)))
        except (json.JSONDecodeError, TypeError):
            break
    return records


class Progress:
    """A bar on a terminal, plain lines elsewhere.

    Args:
        total: Steps of the whole run.
        done: Steps finished before.
        tokens_per_step: Tokens of one step, over all ranks.
        enabled: Whether to print; False on all ranks but the first.
    """

    def __init__(self, total: int, done: int, tokens_per_step: int, *, enabled: bool = True) -> None:
        self._total, self._done, self._tokens, self._enabled = total, done, tokens_per_step, enabled
        self._began = self._last = time.perf_counter()
        self._began_at = self._last_at = done
        self._bar: tqdm | None = None
        if enabled and sys.stderr.isatty() and sys.stdout.isatty():
            # Some terminals say that they have no columns and rows; this takes 80 x 24 for that, tqdm hides the bar.
            columns, rows = shutil.get_terminal_size()
            self._bar = tqdm(total=total, initial=done, ncols=columns, nrows=rows, bar_format=_BAR)

    def tick(self, step: int) -> None:
        """Count ``step`` as finished."""
        if self._bar is not None:
            self._bar.update(step - self._done)
        self._done = step

    def speed(self) -> float:
        """Tokens a second since the last shown step."""
        seconds = time.perf_counter() - self._last
        return (self._done - self._last_at) * self._tokens / max(seconds, 1e-9)

    def show(self, record: Record) -> None:
        """Print a logged step, and start the clock of the next one."""
        self._last, self._last_at = time.perf_counter(), self._done
        if not self._enabled:
            return
        speed = _si(record.tokens_per_s)
        text = f"loss {record.loss:.4f} | lr {record.lr:.2e} | grad norm {record.grad_norm:.3f} | {speed} tok/s"
        if record.val_loss is not None:
            self.say(f"step {record.step:>5}: validation loss {record.val_loss:.4f}")
        if self._bar is not None:
            self._bar.set_description_str(text)
        else:
            print(f"step {record.step:>5}/{self._total} | {text} | eta {self._eta()}", flush=True)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._enabled:
            print(text, flush=True)

    def close(self) -> None:
        """End the bar, so that the terminal is in order."""
        if self._bar is not None:
            self._bar.close()

    def _eta(self) -> str:
        each = (time.perf_counter() - self._began) / max(self._done - self._began_at, 1)
        seconds = round(each * (self._total - self._done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _si(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"
