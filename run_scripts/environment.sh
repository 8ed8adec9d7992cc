# Sourced by the scripts here: sets $PYTHON to a Python that satisfies requirements.txt.
# An active environment that satisfies it is used as it is; otherwise .venv is created in the project's folder and used.
# Arguments: the extra requirements (e.g. "pytest ruff") that must be importable too.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

satisfies() { # python, modules...
    local python=$1
    shift
    command -v "$python" >/dev/null 2>&1 || return 1
    "$python" - "$root/requirements.txt" "$@" >/dev/null 2>&1 <<'PY'
import importlib.metadata, importlib.util, re, sys

def version(text):
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])

if sys.version_info < (3, 11):
    sys.exit(1)
for line in open(sys.argv[1]):
    name, *bounds = re.split(r"(>=|<)", line.strip().replace(",", ""))
    if not name:
        continue
    have = version(importlib.metadata.version(name))
    for operator, bound in zip(bounds[::2], bounds[1::2]):
        if (have < version(bound)) if operator == ">=" else (have >= version(bound)):
            sys.exit(1)
sys.exit(any(importlib.util.find_spec(module) is None for module in sys.argv[2:]))
PY
}

newest_python() {
    local python
    for python in python3.12 python3.11 python3 python; do
        if command -v "$python" >/dev/null 2>&1 && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    echo "Python 3.11 or newer is needed, and none was found; install it (Debian, Ubuntu: apt install python3 python3-venv)" >&2
    return 1
}

make_environment() { # extra ("" or "[test]" packages, space separated)
    local base
    base=$(newest_python) || return 1
    if [ ! -x "$root/.venv/bin/python" ]; then
        echo "making .venv with $("$base" --version)"
        if ! "$base" -m venv "$root/.venv"; then
            rm -rf "$root/.venv"
            echo "python's venv module or pip is missing; install it (Debian, Ubuntu: apt install python3-venv python3-pip)" >&2
            return 1
        fi
    fi
    echo "installing the requirements into .venv (a few minutes the first time)"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt" "$@"
}

use_environment() { # modules that must be importable besides the requirements, then -- and the packages to install
    local modules=() packages=()
    while [ $# -gt 0 ] && [ "$1" != "--" ]; do modules+=("$1"); shift; done
    [ $# -gt 0 ] && shift
    packages=("$@")
    if satisfies python "${modules[@]}"; then
        PYTHON=python
    else
        PYTHON=$root/.venv/bin/python
        satisfies "$PYTHON" "${modules[@]}" || make_environment "${packages[@]}" || return 1
    fi
    export PYTHON
    echo "using $("$PYTHON" -c 'import sys; print(sys.executable, sys.version.split()[0])')"
}

use_torchrun() { # after use_environment: sets ${TORCHRUN[@]}, which forwards the signals of schedulers
    TORCHRUN=("$PYTHON" -m torch.distributed.run)
    local flags
    flags=$("${TORCHRUN[@]}" --help 2>/dev/null)
    # SIGUSR1 must reach the workers, and the default of 30 seconds is too short for a save. Older torch has neither
    # flag and forwards only SIGTERM.
    [[ $flags == *--signals-to-handle* ]] && TORCHRUN+=(--signals-to-handle SIGTERM,SIGINT,SIGUSR1)
    [[ $flags == *--shutdown-timeout* ]] && TORCHRUN+=(--shutdown-timeout 120)
    return 0
}
