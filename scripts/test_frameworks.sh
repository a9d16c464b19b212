#!/usr/bin/env bash
# The fast tests of the integrations in other people's frameworks.
#
#   scripts/test_frameworks.sh newest [pytest's arguments]   in those of $VENV
#   scripts/test_frameworks.sh old [pytest's arguments]      in those of two years ago, in an environment of their own that
#                                                            reuses the torch and the packages of $VENV
#
# VENV      where torch, the tests' packages and the project are   (.venv)
# TABLE     the page whose row is renewed                          (none; docs/versions.md)
# PIP_ARGS  as in the Makefile
set -euo pipefail
cd "$(dirname "$0")/.."
: "${VENV:=.venv}" "${PIP_ARGS:=}" "${TABLE:=}"
which=${1:?newest or old}
shift
python="$(cd "$VENV" && pwd)/bin/python"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [ "$which" = old ]; then
  old=.venv-frameworks-old
  # Published by the end of November 2024; the extra `integrations` asks for no less.
  releases=(transformers==4.46.3 accelerate==1.1.1 lightning==2.4.0 trl==0.12.1 peft==0.13.2 datasets==3.1.0)
  # They load checkpoints of their own as torch did before 2.6, NumPy's random state among them.
  export TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1
  if [ ! -e "$old/.ready" ]; then
    PYTHON="$python" VENV="$old" TORCH=auto bash scripts/environment.sh
    # shellcheck disable=SC2086  # PIP_ARGS is a list
    "$old/bin/python" -m pip --disable-pip-version-check install -q $PIP_ARGS --no-warn-conflicts "${releases[@]}"
    touch "$old/.ready"
  fi
  python=$old/bin/python
fi
found=$("$python" -c 'import importlib.metadata as m
print(*(f"{name} {m.version(name)}" for name in ("transformers", "accelerate", "trl", "lightning", "peft")), sep=", ")')
echo "selbp: $found"
report="$(mktemp)"
trap 'rm -f "$report"' EXIT
failed=0
"$python" -m pytest -n 2 -m "not slow and not gpu" --junitxml "$report" \
  tests/integrations tests/rows/test_rows_transformers.py tests/rows/test_rows_lightning.py "$@" || failed=1
if [ -n "$TABLE" ]; then
  release=$("$python" -c 'import platform; print(platform.python_version())')
  "$python" scripts/versions_table.py row "$found" "$release" "the fast ones of the integrations" "$report" |
    "$python" scripts/versions_table.py write "$TABLE" frameworks
fi
exit $failed
