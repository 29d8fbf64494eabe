#!/bin/sh
# Makes .venv with the locked packages, this package and the demo's data. Does nothing when all is there.
set -eu
cd "$(dirname "$0")/.."

stamp=.venv/.igd-setup
partial=.venv/.igd-partial # there while pip writes: what it left half-done is not to be trusted
wanted=$(cat requirements.lock pyproject.toml | sha256sum | cut -d' ' -f1)

# The places where igd_lib.data.sources.fashion.fashion_mnist_folder looks; one file stands for all four.
have_data() {
    data=${IGD_DATA:-${IGD_CACHE:-$HOME/.cache/igd}/data}
    case $data in "~/"*) data=$HOME/${data#"~/"} ;; esac
    for folder in "$data/fashion-mnist" "$data/FashionMNIST/raw" /usr/share/datasets/fashion-mnist; do
        for suffix in .gz ''; do
            [ ! -f "$folder/train-images-idx3-ubyte$suffix" ] || return 0
        done
    done
    return 1
}

fetch_data() {
    echo "setup: looking for Fashion-MNIST (30 MB, fetched if it is not here)"
    .venv/bin/python -c 'from igd_lib.data.sources.fashion import fashion_mnist_folder; print("setup: data in", fashion_mnist_folder())'
}

usable() { # a Python of the right version with the module $2
    "$1" -c "import sys, $2; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" >/dev/null 2>&1
}

if [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ] && [ -x .venv/bin/python ]; then
    have_data || fetch_data
    exit 0
fi

rm -f "$stamp"
# An interrupted set-up can leave half a package, or no pip: start .venv afresh (pip keeps its downloads).
if [ -e "$partial" ] || ! usable .venv/bin/python pip; then
    python= found=
    for candidate in python3.11 python3.12 python3.13 python3; do
        if usable "$candidate" 'venv, ensurepip'; then
            python=$candidate
            break
        fi
        if [ -z "$found" ] && usable "$candidate" os; then found=$candidate; fi
    done
    if [ -z "$python" ] && [ -n "$found" ]; then
        echo "setup: $found cannot make virtual environments (venv or ensurepip is missing)." >&2
        echo "setup: on Debian or Ubuntu, as root: apt-get install python3-venv" >&2
        exit 1
    fi
    if [ -z "$python" ]; then
        echo "setup: no Python 3.11 to 3.13 found. On Debian or Ubuntu, as root: apt-get install python3 python3-venv" >&2
        exit 1
    fi
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

log=.venv/setup.log
: >"$log"
install() { # quiet: pip's warnings go to the log, and its errors to the screen as well
    if ! .venv/bin/python -m pip install --disable-pip-version-check -q "$@" >>"$log" 2>&1; then
        tail -n 20 "$log" >&2
        echo "setup: installing failed (whole output in $log); run the same command again to continue" >&2
        exit 1
    fi
}
echo "setup: installing the locked packages into .venv (about 2 to 10 minutes; 3 to 7 GB of disk)"
touch "$partial"
install -r requirements.lock
echo "setup: installing igd_lib"
install --no-deps -e .
rm -f "$partial"
fetch_data
echo "$wanted" >"$stamp" # last, so that an interrupted set-up starts again
