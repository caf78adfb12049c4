#!/usr/bin/env bash
# Runs a slice of the tests with the oldest and the newest versions of what this package stands on, each in an environment of
# its own, and prints a row of docs/versions.md for each:  bash scripts/check_versions.sh [row ...]
#
#   VERSIONS_FOLDER      keeps the environments there and uses them again; by default they are made anew and removed (6 GB each)
#   EMERGING_OPTIMIZERS  a checkout or URL of emerging-optimizers' repository, for releases that are not on the package index
#   MEGATRON_LM          the same of Megatron-LM's
#   SLICE                arguments of pytest, instead of the slice below
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

#     row     Python torch  emerging-optimizers  megatron-core; what has a digit first is a release on the index, else a git ref
ROWS="oldest  3.12   2.11.0 0.3.0                0.18.0
      between 3.12   2.14.1 v0.4.0               0.19.2
      newest  3.13   2.15.0 main                 main"
SLICE=${SLICE:-tests/test_versions.py tests/test_oracle_library.py tests/test_registry.py tests/test_engine.py
    tests/test_tp_modes.py tests/test_checkpoint.py tests/test_fully_shard.py tests/test_megatron.py tests/test_megatron_tags.py}
PACKAGES="hypothesis mpi4py mpich numpy packaging psutil pytest pytest-mpi pytest-timeout pytorch_optimizer pyyaml schedulefree
    tqdm lazy-loader absl-py"

keep=${VERSIONS_FOLDER:-}
folder=${keep:-$(mktemp -d)}
[ -n "$keep" ] || trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export OMP_NUM_THREADS=1

say() { printf 'versions: %s\n' "$*" >&2; }

find_python() {
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1"*/bin/python "$(uv python find "$1" 2>/dev/null)"; do
        "$candidate" -c 'import ensurepip' >/dev/null 2>&1 && echo "$candidate" && return
    done
    return 1
}

# A folder with this ref of a repository, which is cloned from a URL or from another folder.
source_of() {
    local to=$folder/$1-$3
    [ -d "$to" ] || { git clone --quiet "$2" "$to" && git -C "$to" checkout --quiet "$3"; } || return
    echo "$to"
}

emerging_optimizers() {
    case $1 in
        [0-9]*) echo "emerging-optimizers==$1" ;;
        *) source_of eo "${EMERGING_OPTIMIZERS:-https://github.com/NVIDIA-NeMo/Emerging-Optimizers}" "$1" ;;
    esac
}

# Megatron-LM's main is used from its checkout, as its own scripts use it, because its wheel needs a compiler.
megatron() {
    case $1 in
        [0-9]*) echo "$1" ;;
        *) source_of megatron "${MEGATRON_LM:-https://github.com/NVIDIA/Megatron-LM}" "$1" ;;
    esac
}

make_env() {
    local env=$1 python=$2 torch=$3 eo=$4 megatron=$5
    rm -rf "$env" && "$python" -m venv "$env" || return
    # torch brings versions of its own of what it needs; the other pins hold.
    grep -vE '^(torch|torchvision|triton|nvidia-|cuda-|emerging-optimizers|megatron-core|setuptools)' constraints.txt >"$env/pins"
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check -c "$env/pins" "torch==$torch" setuptools $PACKAGES || return
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation "$eo" || return
    case $megatron in
        [0-9]*) "$env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "megatron-core==$megatron" ;;
        *) echo "$megatron" >"$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/megatron.pth" ;;
    esac
}

check() {
    local row=$1 torch=$3 python eo megatron env=$folder/env-$1 started=$SECONDS counts status
    python=$(find_python "$2") || { say "$row: found no Python $2"; return 1; }
    eo=$(emerging_optimizers "$4") && megatron=$(megatron "$5") || { say "$row: no such source"; return 1; }
    if ! [ -e "$env/made" ]; then
        say "$row: making an environment"
        make_env "$env" "$python" "$torch" "$eo" "$megatron" >&2 || { say "$row: could not be installed"; return 1; }
        touch "$env/made"
    fi
    say "$row: running the slice"
    started=$SECONDS
    "$env/bin/python" -m pytest -q -p no:cacheprovider $SLICE >"$folder/$row.log" 2>&1
    status=$?
    counts=$(tail -n 1 "$folder/$row.log" | sed 's/ in [0-9].*//; s/=//g; s/^ *//')
    "$env/bin/python" -W ignore - "$row" "$counts" "$((SECONDS - started)) s" <<'PY'
import platform, sys
from importlib.metadata import version
from core.megatron.upstream import installed
row, counts, seconds = sys.argv[1:]
print("|", " | ".join((row, platform.python_version(), version("torch"), version("emerging-optimizers"), installed(), counts, seconds)), "|")
PY
    [ $status -eq 0 ] || { tail -n 60 "$folder/$row.log" >&2; say "$row failed"; }
    [ -n "$keep" ] || rm -rf "$env"
    return $status
}

wanted=${*:-$(awk '{print $1}' <<<"$ROWS")}
echo "| row | Python | torch | emerging-optimizers | megatron-core | tests | time |"
echo "|---|---|---|---|---|---|---|"
failed=0
for name in $wanted; do
    read -r row python torch eo megatron <<<"$(awk -v name="$name" '$1 == name' <<<"$ROWS")"
    [ -n "$row" ] || { say "$name is no row; possible: $(awk '{print $1}' <<<"$ROWS" | xargs)"; exit 2; }
    check "$row" "$python" "$torch" "$eo" "$megatron" || failed=1
done
exit $failed
