#!/usr/bin/env bash
# Makes $VENV with a torch in it, after one line for each thing that must be there. Called by the Makefile.
#
# TORCH=auto: a torch >= 2.12 that $PYTHON already has is reused; else, where there is an NVIDIA driver, the CUDA
# build; else the CPU wheel, if pip can find one; else the CUDA build, with its size said first.
set -euo pipefail
: "${PYTHON:=python3}" "${VENV:=.venv}" "${TORCH:=auto}" "${PIP_ARGS:=}"
version=2.13.0

fail() { echo "selbp: $1" >&2; exit 1; }

command -v "$PYTHON" >/dev/null || fail "no '$PYTHON': install Python 3.10 or newer (Debian: python3), or say PYTHON=..."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$PYTHON is $("$PYTHON" -V 2>&1); Python 3.10 or newer is needed (say PYTHON=...)"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || fail "$PYTHON cannot make environments: install its venv (Debian: python3-venv)"
"$PYTHON" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
  fail "$PYTHON has no C headers: install them (Debian: python3-dev)"
command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler '${CXX:-g++}': install one (Debian: g++), or say CXX=..."
"${CXX:-g++}" -fopenmp -std=c++17 -x c++ -fsyntax-only - <<<'#include <omp.h>' 2>/dev/null ||
  fail "${CXX:-g++} cannot compile C++17 with OpenMP"
echo "selbp: $("$PYTHON" -V 2>&1) with headers and venv, make, $("${CXX:-g++}" --version | head -n 1)"

own_torch() {
  "$PYTHON" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 12))' 2>/dev/null
}

if [ "$TORCH" = auto ] && own_torch; then
  echo "selbp: reusing the torch of $PYTHON"
  "$PYTHON" -m venv --system-site-packages "$VENV"
  requirement=
else
  "$PYTHON" -m venv "$VENV"
  requirement=$TORCH
fi
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
# shellcheck disable=SC2086  # PIP_ARGS is a list of arguments
pip install -q $PIP_ARGS "pip>=23.1"

if [ "$requirement" = auto ]; then
  # shellcheck disable=SC2086
  if [ -e /proc/driver/nvidia/version ]; then
    requirement="torch==$version"
  elif pip install -q --dry-run --no-deps $PIP_ARGS "torch==$version+cpu" >/dev/null 2>&1; then
    requirement="torch==$version+cpu"
  else
    requirement="torch==$version"
    echo "selbp: pip finds no CPU-only torch; torch==$version with its CUDA libraries is a download of about 3 GB" \
      "(PIP_ARGS=--extra-index-url=... names an index that has torch==$version+cpu)"
  fi
fi
if [ -n "$requirement" ]; then
  echo "selbp: installing $requirement"
  # shellcheck disable=SC2086
  pip install -q $PIP_ARGS "$requirement"
fi
touch "$VENV/.torch"
