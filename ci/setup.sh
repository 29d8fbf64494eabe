#!/bin/sh
# Makes .venv with the locked packages and this package, and fetches the first of the data sets that its
# arguments name (fashion-mnist, cifar-10) and that can be had. Does nothing when all is there.
set -eu
cd "$(dirname "$0")/.."

stamp=.venv/.igd-setup
partial=.venv/.igd-partial # there while pip writes: what it left half-done is not to be trusted
index=${IGD_TORCH_INDEX:-} # where PyTorch comes from, such as its index of builds for the CPU alone
wanted=$( (cat requirements.lock pyproject.toml && echo "$index") | sha256sum | cut -d' ' -f1)

data=${IGD_DATA:-${IGD_CACHE:-$HOME/.cache/igd}/data}
case $data in "~/"*) data=$HOME/${data#"~/"} ;; esac

# Whether one of a data set's files is where the library looks; one stands for all.
have() {
    case $1 in
    fashion-mnist)
        set -- "$data/fashion-mnist" "$data/FashionMNIST/raw" /usr/share/datasets/fashion-mnist
        names='train-images-idx3-ubyte.gz train-images-idx3-ubyte' ;;
    cifar-10)
        set -- "$data/cifar-10" "$data/cifar-10/cifar-10-batches-bin" "$data/cifar-10/cifar-10-batches-py" \
            "$data/cifar-10-batches-bin" "$data/cifar-10-batches-py"
        names='data_batch_1.bin data_batch_1' ;;
    *) return 1 ;;
    esac
    for folder in "$@"; do
        for file in $names; do
            [ ! -f "$folder/$file" ] || return 0
        done
    done
    return 1
}

# The first of the named data sets that can be had.
fetch_data() {
    for dataset in "$@"; do
        if have "$dataset"; then return 0; fi
        echo "setup: looking for $dataset (fetched if it is not here)"
        if .venv/bin/python -m igd_lib fetch "$dataset"; then return 0; fi
    done
    return $(($# > 0))
}

usable() { # a Python of the right version with the module $2
    "$1" -c "import sys, $2; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" >/dev/null 2>&1
}

if [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ] && [ -x .venv/bin/python ]; then
    fetch_data "$@"
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
if [ -n "$index" ]; then # a build of one's own choice, and none of the CUDA libraries of the usual one
    echo "setup: PyTorch from $index"
    # shellcheck disable=SC2046 # two requirements
    install --index-url "$index" $(grep -E '^(torch|torchvision)==' requirements.lock)
    grep -vE '^(nvidia|cuda|triton)' requirements.lock >.venv/without-cuda.lock
    install -r .venv/without-cuda.lock
else
    install -r requirements.lock
fi
echo "setup: installing igd_lib"
install --no-deps -e .
rm -f "$partial"
echo "$wanted" >"$stamp" # after all of it, so that an interrupted set-up starts again
fetch_data "$@"
