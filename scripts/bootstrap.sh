#!/usr/bin/env bash
# Makes the environment .venv in the checkout, or brings it up to date: bash scripts/bootstrap.sh [extra of pyproject.toml ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
key=$(cat constraints.txt pyproject.toml | cksum)

say() { printf 'set-up: %s\n' "$*" >&2; }

# A stamp holds the key that an extra ("base" is none) was completely installed for.
up_to_date() {
    local extra
    [ ! -e $venv/installing ] || return 1
    for extra in base "$@"; do
        [ "$(cat "$venv/stamp-$extra" 2>/dev/null)" = "$key" ] || return 1
    done
    $venv/bin/python -c '' 2>/dev/null
}

# Run each candidate: a python3.12 on PATH may be a version manager's shim with nothing behind it.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python python3 python \
        python3.1{3,4,5} "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[3-9]*/bin/python "$(uv python find '>=3.12' 2>/dev/null)"; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    say "found no working Python >= 3.12 with venv (tried \$PYTHON, python3.12, python3, pyenv's versions, uv)."
    say "Install Python 3.12, or name one: PYTHON=path/to/python3.12 bash $0"
    return 1
}

# The requirements of the project and of the extras, one a line; the project itself is used from the checkout.
requirements() {
    $venv/bin/python - "$@" <<'PY'
import sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"], sep="\n")
for extra in sys.argv[1:]:
    print(*project["optional-dependencies"][extra], sep="\n")
PY
}

make_venv() {
    say "making $venv with $python"
    if command -v uv >/dev/null; then
        uv venv --quiet --seed --clear --python "$python" $venv
    else
        "$python" -m venv --clear $venv
    fi
}

install() {
    if command -v uv >/dev/null; then
        uv pip install --quiet --python $venv/bin/python -c constraints.txt -r $venv/requirements.txt && return
        say "uv could not install them; trying pip, which may be configured with another package index"
    fi
    $venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r $venv/requirements.txt
}

up_to_date "$@" && exit

python=$(find_python)
# The lock belongs to descriptor 9, so it lasts until this script ends, however it ends.
exec 9>.venv.lock
lock() { "$python" -c "import fcntl; fcntl.flock(9, $1)" 2>/dev/null; }
lock "fcntl.LOCK_EX | fcntl.LOCK_NB" || { say "waiting for another set-up of this checkout" && lock fcntl.LOCK_EX; }
up_to_date "$@" && exit

if [ -e $venv/installing ]; then
    say "an earlier set-up was interrupted; starting $venv afresh"
    make_venv
elif ! $venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
    make_venv
fi
requirements "$@" >$venv/requirements.txt
touch $venv/installing
say "installing the pinned packages (torch is large: some minutes the first time)"
install
for extra in base "$@"; do
    echo "$key" >"$venv/stamp-$extra"
done
rm $venv/installing
say "done"
