#!/usr/bin/env bash
# Sets everything up and checks everything: lint, types, the wheel under its installed name, and last the tests.
# With arguments it runs only pytest, with them:  bash test.sh tests/test_tree.py -k lines
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash scripts/bootstrap.sh plot megatron examples dev || exit

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python=$PWD/.venv/bin/python
if [ $# -gt 0 ]; then
    exec "$python" -m pytest "$@"
fi

failed=
stage() {
    local name=$1
    shift
    printf '== %s\n' "$name"
    "$@" || failed+="${failed:+, }$name"
}

stage "ruff check" "$python" -m ruff check .
stage "ruff format" "$python" -m ruff format --check .
stage "mypy" "$python" -m mypy
stage "wheel" bash scripts/check_wheel.sh
printf '== pytest\n'
# tests/conftest.py repeats the names above pytest's last line.
FAILED_STAGES=$failed "$python" -m pytest && [ -z "$failed" ]
