#!/usr/bin/env bash
# Makes $VENV with a torch in it, after one line for each thing that must be there. Called by the Makefile.
#
# TORCH=auto: a torch >= 2.6 that $PYTHON already has is reused, with all that lies beside it; else, where there is an
# NVIDIA driver, the CUDA build; else the CPU wheel, if pip can find one; else the CUDA build, with its size said first.
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
cxx="${CXX:-g++}"
command -v "$cxx" >/dev/null || fail "no C++ compiler '$cxx': install one (Debian: g++), or say CXX=..."
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
# What the build does: C++17, a check of the processor's features on x86-64, a shared library that needs libgomp.
cat >"$scratch/try.cpp" <<'END'
extern "C" int omp_get_thread_num(void);
template <class... T> constexpr int sum(T... x) { return (x + ... + 0); }
int wide() {
  if constexpr (sum(1, 2) != 3) return -1;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("bmi2")) return 1;
#endif
  return omp_get_thread_num();
}
END
"$cxx" -std=c++17 -fPIC -shared "$scratch/try.cpp" -lgomp -o "$scratch/try.so" 2>"$scratch/said" || {
  head -n 5 "$scratch/said" >&2
  fail "$cxx ($("$cxx" --version | head -n 1)) cannot build the native core: it takes g++ 9 or newer, or clang 14 or newer, with libgomp"
}
echo "selbp: $("$PYTHON" -V 2>&1) with headers and venv, make, $("$cxx" --version | head -n 1)"

own_torch() {
  "$PYTHON" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) < (2, 6))' 2>/dev/null
}

if [ "$TORCH" = auto ] && own_torch; then
  echo "selbp: reusing the torch of $PYTHON, and the packages beside it"
  "$PYTHON" -m venv --system-site-packages "$VENV"
  # Where $PYTHON is itself an environment, the new one sees the packages of that one's base: name the folders.
  "$PYTHON" -c 'import os, site, sys, sysconfig, torch
folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), os.path.dirname(os.path.dirname(torch.__file__))}
folders.update(os.environ.get("PYTHONPATH", "").split(os.pathsep))
print(*sorted(f"import site; site.addsitedir({folder!r})" for folder in folders if folder), sep="\n")' >"$scratch/reused.pth"
  cp "$scratch/reused.pth" "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_reused.pth"
  # Until Python 3.12 an environment begins with a setuptools of its own, older than the one that is reused.
  own="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/setuptools"
  if [ -d "$own" ]; then "$VENV/bin/python" -m pip --disable-pip-version-check uninstall -q -y setuptools; fi
  "$VENV/bin/python" -c 'import torch' || fail "the new environment does not find the torch of $PYTHON"
  requirement=
else
  "$PYTHON" -m venv "$VENV"
  requirement=$TORCH
fi
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
"$VENV/bin/python" -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (23, 1))' ||
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
  pip install -q $PIP_ARGS "$requirement" || fail "pip could not install $requirement: without a network, say
  PYTHON=... of a Python that has torch 2.6 or newer"
fi
touch "$VENV/.torch"
