#!/usr/bin/env bash
# Every kernel test on every Triton that is supported: each version is unpacked beside the environment, not into it.
# A quarter of an hour a version, most of it compiling for every architecture; MARK="not slow and not gpu" is faster.
#   scripts/triton_versions.sh [version ...]      (3.7.0 3.8.0 3.9.0)
set -euo pipefail
cd "$(dirname "$0")/.."
python="${VENV:-.venv}/bin/python"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
if [ $# -eq 0 ]; then set -- 3.7.0 3.8.0 3.9.0; fi
for version in "$@"; do
    "$python" -m pip install -q ${PIP_ARGS:-} --no-deps --target "$folder/$version" "triton==$version"
    echo "Triton $version"
    PYTHONPATH="$folder/$version" "$python" -m pytest -q tests/triton_kernels -m "${MARK:-not gpu}"
done
