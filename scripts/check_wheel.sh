#!/usr/bin/env bash
# Builds the wheel and takes an optimizer step with it, outside the checkout, in an environment that has the wheel's own
# files and, through a path file, the packages of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$PWD/.venv/bin/python
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# From a copy: setuptools would build inside the checkout, and take up what an earlier build left there.
mkdir "$folder/source"
cp -R core shardstep setup.py pyproject.toml README.md LICENSE "$folder/source"
"$python" -m pip wheel --quiet --no-deps --no-index --no-build-isolation --wheel-dir "$folder" "$folder/source"

"$python" -m venv --without-pip "$folder/env"
packages='import sysconfig; print(sysconfig.get_path("purelib"))'
"$python" -c "$packages" >"$("$folder/env/bin/python" -c "$packages")/dependencies.pth"
# Not with --no-deps: what the wheel asks for must be there.
"$python" -m pip --python "$folder/env/bin/python" install --quiet --no-index "$folder"/*.whl

cp tests/support/wheel_smoke.py "$folder"
cd "$folder"
env/bin/python -I wheel_smoke.py "$folder/env"

# A checkout that is installed as it stands gives the same.
"$python" -m venv --without-pip editable
"$python" -c "$packages" >"$(editable/bin/python -c "$packages")/dependencies.pth"
"$python" -m pip --python editable/bin/python install --quiet --no-index --no-build-isolation --editable source
editable/bin/python -I wheel_smoke.py source

# A user's type checker sees the names of the front door.
printf 'from shardstep import get_optimizer\nreveal_type(get_optimizer)\n' >user.py
"$python" -m mypy --python-executable env/bin/python user.py | grep ChainedOptimizer >/dev/null ||
    { echo "mypy does not see the types of shardstep" >&2; exit 1; }

# The wheel's path file brings our optimizers into Megatron-Core, when the environment asks for it.
SHARDSTEP_MEGATRON=1 env/bin/python -I -W ignore -c '
from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS
assert "shardstep_muon" in _EMERGING_OPTIMIZERS, "the path file of the wheel did nothing"
print("with SHARDSTEP_MEGATRON=1 Megatron-Core has shardstep_muon")'
