#!/usr/bin/env bash
# The op-by-op suite of the backward through rows on the oldest and the newest torch that it supports, each in an
# environment of its own. The rules follow torch's internal operators, which may change from one version to the next.
#
# TORCH_VERSIONS  which                                             (2.12.1 2.14.1)
# TORCH_FULL      1: take PyPI's wheel, with CUDA's libraries a download of 3 GB, where there is no CPU wheel   (0)
# PYTHON, PIP_ARGS  as in the Makefile
set -euo pipefail
: "${PYTHON:=python3}" "${PIP_ARGS:=}" "${TORCH_VERSIONS:=2.12.1 2.14.1}" "${TORCH_FULL:=0}"

left_out=
for version in $TORCH_VERSIONS; do
  # shellcheck disable=SC2086  # PIP_ARGS is a list of arguments
  if "$PYTHON" -m pip download -q --no-deps -d "$(mktemp -d)" $PIP_ARGS "torch==$version+cpu" >/dev/null 2>&1; then
    torch="torch==$version+cpu"
  elif [ "$TORCH_FULL" = 1 ]; then
    torch="torch==$version"
  else
    left_out="$left_out $version"
    continue
  fi
  VENV=".venv-torch-$version" TORCH="$torch" bash scripts/environment.sh
  python=".venv-torch-$version/bin/python"
  # shellcheck disable=SC2086
  "$python" -m pip install -q $PIP_ARGS -e ".[test]" "$torch"
  echo "selbp: the rules on torch $version"
  "$python" -m pytest -q -p no:cacheprovider tests/training/rows/test_rows_ops.py tests/training/rows/test_rows_direct.py
done
[ -z "$left_out" ] || echo "selbp: not tested on torch$left_out: pip finds no CPU wheel (TORCH_FULL=1 takes PyPI's, 3 GB)"
