#!/usr/bin/env bash
# The fast suite on each supported torch, each in an environment of its own, and a table of what passed.
#
#   scripts/test_torch_versions.sh [version ...]       (2.6.0 2.8.0 2.11.0 2.13.0 2.15.0)
#
# The CPU wheel is taken where pip finds one; else PyPI's CUDA build without its libraries, in whose place
# scripts/stub_libraries.py puts stubs: under 1 GB a version. About 15 minutes a version on two cores.
#
# TESTS           what runs                                    (the fast suite; the rules' tests: tests/training/rows)
# JOBS            processes                                    (2)
# TABLE           where the table is written, beside stdout    (nowhere)
# PYTHON, PIP_ARGS  as in the Makefile
set -euo pipefail
cd "$(dirname "$0")/.."
: "${PYTHON:=python3}" "${PIP_ARGS:=}" "${TESTS:=tests}" "${JOBS:=2}" "${TABLE:=/dev/null}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" SELBP_CUDA=0
if [ $# -eq 0 ]; then set -- 2.6.0 2.8.0 2.11.0 2.13.0 2.15.0; fi

# shellcheck disable=SC2086  # PIP_ARGS and TESTS are lists
prepare() { # makes the environment $1 with torch $2
  local venv=$1 version=$2 pip="$1/bin/python -m pip --disable-pip-version-check -q"
  [ -e "$venv/.ready" ] && return
  "$PYTHON" -m venv "$venv"
  if ! $pip install $PIP_ARGS "torch==$version+cpu" >/dev/null 2>&1; then
    $pip install $PIP_ARGS --no-deps "torch==$version" 2>/dev/null
    # What torch needs besides CUDA's libraries and Triton, as its own metadata says.
    "$venv/bin/python" - >"$venv/needs.txt" <<'END'
import importlib.metadata as m
from pip._vendor.packaging.requirements import Requirement
for line in m.requires("torch"):
    r = Requirement(line)
    if (r.marker is None or r.marker.evaluate({"extra": ""})) and not r.name.startswith(("nvidia", "cuda", "triton")):
        print(f"{r.name}{r.specifier}")
END
    $pip install $PIP_ARGS -r "$venv/needs.txt"
    "$PYTHON" scripts/stub_libraries.py "$venv"
  fi
  "$venv/bin/python" -c 'import torch; print("selbp: torch", torch.__version__)'
  # Without dependencies: pip would fetch CUDA's libraries, which torch's metadata still asks for.
  "$venv/bin/python" - >"$venv/tests.txt" <<'END'
import runpy, sys
sys.argv = ["install.py"]
found = runpy.run_path("scripts/install.py")
print(*(r for r in found["requirements"](["test"]) if r.name != "torch"), "build", "triton>=3.6", sep="\n")
END
  $pip install $PIP_ARGS -r "$venv/tests.txt" 2>/dev/null
  touch "$venv/.ready"
}

rows=()
failed=0
for version in "$@"; do
  venv=".venv-torch-$version"
  if ! prepare "$venv" "$version"; then
    rows+=("| $version | not installed | | |")
    failed=1
    continue
  fi
  tree="$(mktemp -d)" # its own copy: the working tree's extension belongs to another environment
  git ls-files -z | xargs -0 cp --parents -t "$tree"
  log="$venv/tests.log"
  # shellcheck disable=SC2086
  (cd "$tree" && python="$OLDPWD/$venv/bin/python" &&
    "$python" -m pip --disable-pip-version-check install -q --no-index --no-deps --no-build-isolation -e . &&
    "$python" -m pytest -n "$JOBS" --dist loadfile -q -p no:cacheprovider -m "not slow and not gpu" $TESTS) >"$log" 2>&1 ||
    failed=1
  said=$(tail -n 1 "$log")
  count() { grep -oE "[0-9]+ $1" <<<"$said" | grep -oE '[0-9]+' || echo 0; }
  why=$(grep -oE '^(FAILED|ERROR) [^ ]+' "$log" | sed 's/^[A-Z]* //' | head -n 8 | tr '\n' ' ' || true)
  rows+=("| $version | $(count passed) | $(count failed) | $(count skipped) | ${why:-} |")
  printf '%s\n' "${rows[-1]}"
  rm -rf "$tree"
done
{
  echo "| torch | passed | failed | skipped | which ($("$PYTHON" -V), $(date +%F)) |"
  echo "|---|---:|---:|---:|---|"
  printf '%s\n' "${rows[@]}"
} | tee "$TABLE"
exit $failed
