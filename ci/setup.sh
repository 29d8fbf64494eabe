#!/bin/sh
# Makes .venv with the locked packages, this package and the demo's data. Does nothing when all is there.
set -eu
cd "$(dirname "$0")/.."

stamp=.venv/.igd-setup
wanted=$(cat requirements.lock pyproject.toml ci/setup.sh | sha256sum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ]; then
    exit 0
fi

python=
for candidate in python3.11 python3.12 python3.13 python3; do
    if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "setup: no Python 3.11 to 3.13 found. On Debian or Ubuntu, as root: apt-get install python3 python3-venv" >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "setup: $python cannot make virtual environments. On Debian or Ubuntu, as root: apt-get install python3-venv" >&2
    exit 1
fi

echo "setup: installing the locked packages into .venv (about 2 to 10 minutes; 3 to 7 GB of disk)"
rm -f "$stamp"
[ -x .venv/bin/python ] || "$python" -m venv .venv
log=.venv/setup.log
if ! .venv/bin/python -m pip install --disable-pip-version-check -q -r requirements.lock >"$log" 2>&1 ||
    ! .venv/bin/python -m pip install --disable-pip-version-check -q --no-deps -e . >>"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "setup: installing failed (whole output in $log); run the same command again to continue" >&2
    exit 1
fi

echo "setup: looking for Fashion-MNIST (30 MB, fetched if it is not here)"
.venv/bin/python -c 'from igd_lib.data import fashion_mnist_folder; print("setup: data in", fashion_mnist_folder())'
echo "$wanted" >"$stamp"
