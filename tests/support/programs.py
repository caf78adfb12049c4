"""Programs of several processes that print JSON: for tests of what takes long to import, or must not be imported here."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def rows_of(module: str, folder: Path, arguments: Sequence[Sequence[str]], seconds: float) -> list[dict[str, Any]]:
    """The lines of JSON that the first process of ``module`` printed; one process for each list of arguments.

    Raises:
        AssertionError: when one fails, with what all of them said.
    """
    logs = [folder / f"process {i}" for i in range(len(arguments))]
    processes = []
    for given, log in zip(arguments, logs, strict=True):
        with log.open("w") as out:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-W", "ignore", "-m", module, *given]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = [log.read_text() for log in logs]
    assert not any(codes), "\n".join(said)
    return [json.loads(line) for line in said[0].splitlines() if line.startswith("{")]
