#!/usr/bin/env bash
# Builds the CPU core with each supported compiler, allows our files no warning, and runs tests on what was built.
#
#   scripts/test_compilers.sh [compiler ...]     (g++-9 g++-11 g++-12 g++-14 clang++-14 clang++-16)
#
# A compiler that is not on PATH is taken from another Debian release, unpacked by debootstrap into $ROOTS, where this
# runs as root and debootstrap is installed; else it is left out, and the last lines say so. What it builds is tested
# inside that release where this one's libraries are too old for it.
#
# VENV    an environment with selbp's test requirements       (.venv)
# ROOTS   where other releases are unpacked, and kept          (.compilers)
# TESTS   what runs on each build
# TABLE   the page whose rows are renewed                      (none; docs/versions.md)
set -euo pipefail
cd "$(dirname "$0")/.."
: "${VENV:=.venv}" "${ROOTS:=.compilers}" "${TABLE:=}"
: "${TESTS:=tests/test_native_levels.py tests/ops/test_gram.py tests/ops/test_statistics.py tests/ops/test_matching.py}"
python="$PWD/$VENV/bin/python"
load="import torch, selbp._native"
scratch="$(mktemp -d)"
export TMPDIR="$scratch" # what the build tries on the compiler must lie where another release sees it
mounted=()
clean() {
  for place in "${mounted[@]}"; do umount "$place"; done
  rm -rf "$scratch"
}
trap clean EXIT
if [ $# -eq 0 ]; then set -- g++-9 g++-11 g++-12 g++-14 clang++-14 clang++-16; fi

release_of() {
  case "$1" in
    g++-9 | g++-10) echo bullseye ;;
    g++-13 | g++-14) echo trixie ;;
  esac
}

# Prints a command that runs compiler $1: itself, or a script that runs it inside another release.
command_of() {
  if command -v "$1" >/dev/null; then
    command -v "$1"
    return
  fi
  local release root
  release=$(release_of "$1")
  if [ -z "$release" ] || [ "$(id -u)" != 0 ] || ! command -v debootstrap >/dev/null; then return 1; fi
  root="$PWD/$ROOTS/$release"
  if [ ! -e "$root/usr/bin/$1" ]; then
    mkdir -p "$ROOTS"
    # libffi-dev: for Python's ctypes, by a name that every release has
    debootstrap --variant=minbase --include="$1,libffi-dev" "$release" "$root" ${MIRROR:-} >"$scratch/debootstrap.log" 2>&1 || return 1
  fi
  printf '#!/bin/sh\nexec chroot "%s" /usr/bin/env -C "$PWD" %s "$@"\n' "$root" "$1" >"$scratch/$1"
  chmod +x "$scratch/$1"
  echo "$scratch/$1"
}

# The other release sees the sources, and the environment with its Python, where they lie here: of a Python in /usr,
# whose place there is the release's own, only the headers.
mount_into() {
  local root="$PWD/$ROOTS/$1" place below
  below=$("$python" -c '
import sys, sysconfig
print(sysconfig.get_path("include") if sys.base_prefix == "/usr" else sys.base_prefix)')
  for place in "$scratch" "$below" "$PWD/$VENV" /proc /dev; do
    mkdir -p "$root$place"
    mount --bind "$place" "$root$place"
    mounted+=("$root$place")
  done
}

summary=()
rows=() # of the page
failed=0
for compiler in "$@"; do
  if ! cxx=$(command_of "$compiler"); then
    summary+=("$compiler: left out, it is not installed and no release could be unpacked")
    continue
  fi
  [ "$cxx" = "$scratch/$compiler" ] && mount_into "$(release_of "$compiler")"
  tree="$scratch/tree-$compiler"
  mkdir "$tree"
  git ls-files -z | xargs -0 cp --parents -t "$tree" 2>/dev/null || true # a file that was deleted is not copied
  headers=$("$python" -c 'import pybind11; print(pybind11.get_include())')
  if ! (cd "$tree" && CC="$cxx" CXX="$cxx" SELBP_CUDA=0 CFLAGS="-Wpedantic -Wconversion -isystem $headers" \
    "$python" setup.py build_ext --inplace) >"$scratch/$compiler.log" 2>&1; then
    tail -n 20 "$scratch/$compiler.log"
    summary+=("$compiler: does not build")
    failed=1
    continue
  fi
  release=$("$cxx" -dumpfullversion 2>/dev/null || "$cxx" -dumpversion)
  warnings=$(grep -cE '^(csrc|.*/tree-[^/]*/csrc)/.*warning' "$scratch/$compiler.log" || true)
  grep -E '^(csrc|.*/tree-[^/]*/csrc)/.*warning' "$scratch/$compiler.log" | sort | uniq -c || true
  ln -s ../triton_kernels "$tree/selbp/triton_kernels"
  run=(env -C "$tree" CXX=g++)
  if ! said=$("${run[@]}" "$python" -c "$load" 2>&1); then
    if [ "$cxx" = "$scratch/$compiler" ]; then
      run=(chroot "$PWD/$ROOTS/$(release_of "$compiler")" /usr/bin/env -C "$tree" CXX="$compiler")
    fi
    if ! "${run[@]}" "$python" -c "$load" 2>/dev/null; then
      summary+=("$compiler ($release): $warnings warnings; not run: ${said##*said: }")
      rows+=("| ${compiler%-*} $release | $warnings | not run: it links a newer release's libraries | $(date +%F) |")
      if [ "$warnings" != 0 ] || ! grep -qE 'GLIBC|CXXABI' <<<"$said"; then failed=1; fi  # another release's libraries may be newer
      rm -rf "$tree"
      continue
    fi
  fi
  # shellcheck disable=SC2086  # TESTS is a list
  ran=$("${run[@]}" "$python" -m pytest -q -p no:cacheprovider -m "not slow and not gpu" $TESTS 2>&1 | tail -n 1) || true
  summary+=("$compiler ($release): $warnings warnings; $ran")
  counts=$(grep -oE '[0-9]+ (passed|failed|error)' <<<"$ran" | paste -sd , | sed 's/,/, /g' || true)
  rows+=("| ${compiler%-*} $release | $warnings | ${counts:-none ran} | $(date +%F) |")
  if [ "$warnings" != 0 ] || [[ "$ran" =~ failed|error ]] || [[ ! "$ran" =~ passed ]]; then failed=1; fi
  rm -rf "$tree"
done
printf '%s\n' "" "${summary[@]}"
if [ -n "$TABLE" ]; then
  printf '%s\n' "${rows[@]}" | "$python" scripts/versions_table.py write "$TABLE" compilers
fi
exit $failed
