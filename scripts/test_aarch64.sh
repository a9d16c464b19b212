#!/usr/bin/env bash
# The native core on another machine: cross-compiled for aarch64 without a warning, its kernels run in qemu, and what
# they give held to what x86-64 gave (tests/native/machine_numbers.txt): the same rows, and weights to 1e-12.
#
# RECORD=1  writes that file from this machine's own build
# CXX       this machine's compiler           (g++)
# VENV      an environment with Python        (.venv)
set -euo pipefail
cd "$(dirname "$0")/.."
: "${RECORD:=0}" "${CXX:=g++}"
python="${VENV:-.venv}/bin/python"
[ -x "$python" ] || python=python3
prefix=aarch64-linux-gnu
recorded=tests/native/machine_numbers.txt
out=build/aarch64

build() { # FOLDER COMPILER: the driver, and an object of each family
  local folder=$1 compiler=$2
  local command=("$compiler" -std=c++17 -O3 -ffp-contract=off -fno-math-errno -Wall -Wextra -Werror
    -DSELBP_LEVEL=baseline -Icsrc)
  rm -rf "$folder"
  mkdir -p "$folder"
  printf '%s\0' csrc/*/cpu.cpp |
    xargs -0 -P "${MAX_JOBS:-2}" -I{} bash -c '"${@:3}" -c "$1" -o "$2/$(basename "$(dirname "$1")").o"' - {} "$folder" "${command[@]}"
  "${command[@]}" tests/native/machine_driver.cpp "$folder"/*.o -lgomp -pthread -o "$folder/driver"
}

if [ "$RECORD" = 1 ]; then
  build "$out/here" "$CXX"
  "$out/here/driver" >"$recorded"
fi
for tool in "$prefix-g++" "$prefix-objdump" qemu-aarch64; do
  if ! command -v "$tool" >/dev/null; then
    echo "selbp: aarch64 skipped: no $prefix-g++ or qemu-aarch64 (Debian: g++-$prefix, qemu-user)"
    exit 0
  fi
done
build "$out/there" "$prefix-g++"
for family in gram matching mean_gradient statistics residual; do
  for lanes in 4s 2d; do
    count=$("$prefix-objdump" -d "$out/there/$family.o" | grep -cE "fmla\s+v[0-9]+\.$lanes" || true)
    echo "selbp: $family: $count fused multiply-adds on .$lanes"
    [ "$count" -gt 0 ] || { echo "selbp: $family does not use NEON on .$lanes" >&2; exit 1; }
  done
done
qemu-aarch64 -L "/usr/$prefix" "$out/there/driver" >"$out/there/numbers.txt"
"$python" - "$recorded" "$out/there/numbers.txt" <<'END'
import math, sys

want, got = ([line.split() for line in open(path)] for path in sys.argv[1:])
if [line[:2] for line in want] != [line[:2] for line in got]:
    sys.exit("selbp: the driver prints other names than were recorded: RECORD=1 on x86-64")
wrong = []
for (name, tolerance, *expected), (_, _, *found) in zip(want, got):
    size = max((abs(float(x)) for x in expected if math.isfinite(float(x))), default=0.0)
    bound = float(tolerance) * max(size, 1.0)
    if len(expected) != len(found) or not all(
        a == b or abs(float(a) - float(b)) <= bound for a, b in zip(expected, found)
    ):
        wrong.append(f"{name}\n  x86-64:  {' '.join(expected)}\n  aarch64: {' '.join(found)}")
if wrong:
    sys.exit("selbp: aarch64 gives something else:\n" + "\n".join(wrong))
print(f"selbp: aarch64 gives what x86-64 gives, in {len(want)} results of {sum(map(len, want)) - 2 * len(want)} numbers")
END
