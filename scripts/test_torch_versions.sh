#!/usr/bin/env bash
# The fast suite on each supported torch, each in an environment of its own, and a table of what passed.
#
#   scripts/test_torch_versions.sh [version ...]       (2.6.0 2.8.0 2.11.0 2.13.0 2.15.0)
#
# The CPU wheel is taken where pip finds one; else PyPI's CUDA build without its libraries, in whose place
# scripts/stub_libraries.py puts stubs: under 1 GB a version. About 15 minutes a version on two cores.
#
# TESTS           what runs                                    (the fast suite; the rules' tests: tests/rows)
# JOBS            processes                                    (2)
# TABLE           the page whose rows are renewed              (none; docs/versions.md)
# PYTHON          the interpreter; a row says which             (python3; python3.14t for one without the GIL)
# PIP_ARGS        as in the Makefile
set -euo pipefail
cd "$(dirname "$0")/.."
: "${PYTHON:=python3}" "${PIP_ARGS:=}" "${TESTS:=tests}" "${JOBS:=2}" "${TABLE:=}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" SELBP_CUDA=0
if [ $# -eq 0 ]; then set -- 2.6.0 2.8.0 2.11.0 2.13.0 2.15.0; fi

# What torch needs besides CUDA's libraries, as its own metadata says. Triton is among it: torch compiles with its own.
torch_needs='
import importlib.metadata as m
from pip._vendor.packaging.requirements import Requirement
for line in m.requires("torch"):
    r = Requirement(line)
    if (r.marker is None or r.marker.evaluate({"extra": ""})) and not r.name.startswith(("nvidia", "cuda")):
        print(f"{r.name}{r.specifier}")
'
# Without torch: pip would fetch CUDA's libraries, which torch's metadata asks for. So it need not warn of conflicts.
tests_need='
import importlib.metadata as m, runpy, sys
sys.argv = ["install.py"]
found = runpy.run_path("scripts/install.py")
there = {"torch", *(r.name for r in map(found["Requirement"], m.requires("torch")) if r.name == "triton")}
print(*(r for r in found["requirements"](["test"]) if r.name not in there), "build", sep="\n")
'

# Makes the environment $1 with torch $2. Called where `set -e` has no effect: each step says what follows if it fails.
# shellcheck disable=SC2086  # PIP_ARGS is a list
prepare() {
  local venv=$1 version=$2 pip="$1/bin/python -m pip --disable-pip-version-check -q"
  [ -e "$venv/.ready" ] && return
  "$PYTHON" -m venv "$venv" || return
  if ! $pip install $PIP_ARGS "torch==$version+cpu" >/dev/null 2>&1; then
    $pip install $PIP_ARGS --no-deps "torch==$version" || return
    "$venv/bin/python" -c "$torch_needs" >"$venv/needs.txt" || return
    $pip install $PIP_ARGS --no-warn-conflicts -r "$venv/needs.txt" || return
    "$PYTHON" scripts/stub_libraries.py "$venv" || return
  fi
  "$venv/bin/python" -W ignore -c 'import torch; print("selbp: torch", torch.__version__)' || return
  "$venv/bin/python" -c "$tests_need" >"$venv/tests.txt" || return
  $pip install $PIP_ARGS --no-warn-conflicts -r "$venv/tests.txt" || return
  touch "$venv/.ready"
}

rows=()
failed=0
release=$("$PYTHON" -c 'import platform, sysconfig
print(platform.python_version() + "t" * bool(sysconfig.get_config_var("Py_GIL_DISABLED")))')
for version in "$@"; do
  venv=".venv-torch-$version-python$release"
  what="the fast suite"
  [ "$TESTS" = tests ] || what="\`$TESTS\`"
  if ! prepare "$venv" "$version"; then
    rows+=("| $version | | $what | - | - | - | not installed | $(date +%F) |")
    failed=1
    continue
  fi
  tree="$(mktemp -d)" # its own copy: the working tree's extension belongs to another environment
  git ls-files -z | xargs -0 cp --parents -t "$tree"
  log="$PWD/$venv/tests.log" report="$PWD/$venv/tests.xml" python="$PWD/$venv/bin/python"
  rm -f "$report"
  # shellcheck disable=SC2086
  (cd "$tree" &&
    "$python" -m pip --disable-pip-version-check install -q --no-index --no-deps --no-build-isolation -e . &&
    "$python" -m pytest -n "$JOBS" --dist loadfile -q -p no:cacheprovider --junitxml "$report" \
      -m "not slow and not gpu" $TESTS) >"$log" 2>&1 || failed=1
  rows+=("$("$PYTHON" scripts/versions_table.py row "$version" "$release" "$what" "$report")") || failed=1
  printf '%s\n' "${rows[-1]}"
  rm -rf "$tree"
done
if [ -n "$TABLE" ]; then
  printf '%s\n' "${rows[@]}" | "$PYTHON" scripts/versions_table.py write "$TABLE" torch
fi
exit $failed
