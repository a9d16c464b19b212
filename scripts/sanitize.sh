#!/usr/bin/env bash
# The CPU core under the sanitizers: memory and undefined behaviour while the operators' fuzz and wrong calls run, data
# races in a driver that calls every kernel from several threads. A few minutes, two of them compiling.
#
# SANITIZE  which: address, thread or both  (address thread)
# CXX       must be GCC                     (g++)
# ARGS      handed to pytest, for example -k match
set -euo pipefail
cd "$(dirname "$0")/.."
: "${SANITIZE:=address thread}" "${CXX:=g++}" "${ARGS:=}"
python="${VENV:-.venv}/bin/python"
out=build/sanitize
march=()
grep -qw avx2 /proc/cpuinfo 2>/dev/null && march=(-march=x86-64-v3)
flags=(-std=c++17 -O1 -g1 -fno-omit-frame-pointer -ffp-contract=off -fno-math-errno -Icsrc "${march[@]}")

# One level, under the name of the baseline: compile FOLDER FLAG...
compile() {
  local folder=$1 source; shift
  mkdir -p "$folder"
  for source in csrc/*/cpu.cpp; do
    printf '%s\0' "$source"
  done | xargs -0 -P "${MAX_JOBS:-2}" -I{} bash -c '
    object="$0/$(dirname "${1#csrc/}").o"; shift
    "$@" -c {} -o "$object"' "$folder" {} "$CXX" "${flags[@]}" -DSELBP_LEVEL=baseline "$@"
}

for which in $SANITIZE; do
  folder="$out/$which"
  rm -rf "$folder"
  case $which in
  address)
    checks=(-fsanitize=address,undefined -fno-sanitize-recover=undefined -fPIC -fvisibility=hidden)
    compile "$folder" "${checks[@]}"
    mkdir -p "$folder/package"
    cp -rL selbp "$folder/package/selbp"
    find "$folder/package" -name '*.so' -delete
    suffix="$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')"
    # shellcheck disable=SC2046  # a list of flags
    "$CXX" "${flags[@]}" "${checks[@]}" -shared '-DSELBP_SOURCES=""' $("$python" -m pybind11 --includes) \
      csrc/module.cpp "$folder"/*.o -lgomp -o "$folder/package/selbp/_native$suffix"
    echo "selbp: the operators under AddressSanitizer and UndefinedBehaviorSanitizer"
    # The C++ library comes first, for the sanitizer looks there for what throws.
    # shellcheck disable=SC2086  # ARGS is a list of arguments
    LD_PRELOAD="$("$CXX" -print-file-name=libasan.so) $("$CXX" -print-file-name=libubsan.so) $("$CXX" -print-file-name=libstdc++.so)" \
      ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$folder/package" \
      "$python" -m pytest -q --capture=sys -p no:cacheprovider -m "not slow and not gpu" \
      tests/fuzz/test_fuzz_operators.py tests/wrong_calls/test_wrong_calls_ops.py tests/ops/test_score_minibatch.py $ARGS
    ;;
  thread)
    compile "$folder" -fsanitize=thread
    "$CXX" "${flags[@]}" -fsanitize=thread tests/native/race_driver.cpp "$folder"/*.o -lgomp -o "$folder/race" -pthread
    echo "selbp: the kernels under ThreadSanitizer"
    TSAN_OPTIONS=halt_on_error=1 "$folder/race"
    ;;
  *)
    echo "selbp: SANITIZE must be address, thread or both, got '$which'" >&2
    exit 1
    ;;
  esac
done
