#!/usr/bin/env bash
# Every kernel test on every Triton that is supported: each version is unpacked beside the environment, not into it.
# A quarter of an hour a version, most of it compiling for every architecture; MARK="not slow and not gpu" is faster.
#   scripts/triton_versions.sh [version ...]      (3.6.0 3.7.0 3.8.0 3.9.0)
#
# TRITONS  where versions are unpacked, and kept       (a folder that is removed in the end)
# TABLE    the page whose rows are renewed             (none; docs/versions.md)
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TRITONS:=}" "${TABLE:=}" "${MARK:=not gpu}"
python="${VENV:-.venv}/bin/python"
folder="${TRITONS:-$(mktemp -d)}"
report="$(mktemp)"
clean() {
    rm -f "$report"
    [ -n "$TRITONS" ] || rm -rf "$folder"
}
trap clean EXIT
if [ $# -eq 0 ]; then set -- 3.6.0 3.7.0 3.8.0 3.9.0; fi
failed=0
rows=()
what="\`tests/triton_kernels\`"
case "$MARK" in *"not slow"*) what+=", the fast ones" ;; esac
release=$("$python" -c 'import platform; print(platform.python_version())')
for version in "$@"; do
    if [ ! -d "$folder/$version/triton" ]; then
        # shellcheck disable=SC2086  # PIP_ARGS is a list
        "$python" -m pip install -q ${PIP_ARGS:-} --no-deps --target "$folder/$version" "triton==$version"
    fi
    echo "Triton $version"
    rm -f "$report"
    PYTHONPATH="$folder/$version${PYTHONPATH:+:$PYTHONPATH}" "$python" -m pytest -q tests/triton_kernels -m "$MARK" \
        --junitxml "$report" || failed=1
    rows+=("$("$python" scripts/versions_table.py row "$version" "$release" "$what" "$report")") || failed=1
done
printf '%s\n' "${rows[@]}"
if [ -n "$TABLE" ]; then
    printf '%s\n' "${rows[@]}" | "$python" scripts/versions_table.py write "$TABLE" Triton
fi
exit $failed
