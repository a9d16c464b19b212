#!/usr/bin/env bash
# The fast tests of the integrations in frameworks of two years ago, in an environment of their own that reuses the torch
# and the packages of $VENV. A minute of installing, and a few of tests.
#
#   scripts/test_old_frameworks.sh [pytest's arguments]
#
# VENV      where torch, the tests' packages and the project are   (.venv)
# PIP_ARGS  as in the Makefile
set -euo pipefail
cd "$(dirname "$0")/.."
: "${VENV:=.venv}" "${PIP_ARGS:=}"
old=.venv-frameworks-old
# Published by the end of November 2024; the extra `integrations` asks for no less.
releases=(transformers==4.46.3 accelerate==1.1.1 lightning==2.4.0 trl==0.12.1 peft==0.13.2 datasets==3.1.0)
# They load checkpoints of their own as torch did before 2.6, NumPy's random state among them.
export TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [ ! -e "$old/.ready" ]; then
  PYTHON="$(cd "$VENV" && pwd)/bin/python" VENV="$old" TORCH=auto bash scripts/environment.sh
  # shellcheck disable=SC2086  # PIP_ARGS is a list
  "$old/bin/python" -m pip --disable-pip-version-check install -q $PIP_ARGS --no-warn-conflicts "${releases[@]}"
  touch "$old/.ready"
fi
echo "selbp: ${releases[*]}"
"$old/bin/python" -m pytest -n 2 -m "not slow and not gpu" \
  tests/integrations tests/rows/test_rows_transformers.py tests/rows/test_rows_lightning.py "$@"
