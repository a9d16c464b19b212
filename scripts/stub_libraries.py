"""Lets a CUDA build of torch import where CUDA's libraries are not: ``python scripts/stub_libraries.py ENVIRONMENT``.

PyPI has torch for x86-64 as a CUDA build only, whose libraries are another 3 GB. The tests that run on a CPU need none
of them. For each library that torch names and that is missing, gcc makes a stub of that name beside torch's own, with
the symbols and symbol versions that torch asks for. Each returns 100, which is cudaErrorNoDevice, so that torch finds
no device. Needs gcc, nm and readelf.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

SYSTEM = ("libc.so", "libm.so", "libpthread", "libdl", "librt", "libstdc++", "libgcc_s", "ld-linux", "libutil")
NO_DEVICE, SUCCESS = 100, 0
RETURNS = {"__cudaRegisterFatBinary": SUCCESS}  # called as torch's libraries are loaded


def said(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def symbols(library: Path) -> tuple[set[tuple[str, str]], set[str]]:
    """(name, version) of what ``library`` asks for, and the names that it defines."""
    wanted, defined = set(), set()
    for line in said("nm", "-D", str(library)).splitlines():
        fields = line.split()
        name, _, version = fields[-1].partition("@")
        if len(fields) == 2 and fields[0] in "Uw":
            wanted.add((name, version.lstrip("@")))
        else:
            defined.add(name)
    return wanted, defined


def versions_by_library(library: Path) -> dict[str, set[str]]:
    """The symbol versions that ``library`` wants of each of those it names."""
    found: dict[str, set[str]] = defaultdict(set)
    current = ""
    for line in said("readelf", "-VW", str(library)).splitlines():
        if named := re.search(r"Version: 1\s+File: (\S+)", line):
            current = named[1]
        elif (version := re.search(r"Name: (\S+)\s+Flags", line)) and current:
            found[current].add(version[1])
    return found


def write_stub(target: Path, names: dict[str, str], versions: set[str], scratch: Path) -> None:
    """Make the library ``target`` of ``names`` (symbol -> version, "" for none)."""
    functions = [
        f'long stub_{i}(void) __asm__("{name}"); long stub_{i}(void) {{ return {RETURNS.get(name, NO_DEVICE)}; }}'
        for i, name in enumerate(sorted(names))
    ]
    source, script = scratch / "stub.c", scratch / "stub.map"
    source.write_text("\n".join(functions) or "int nothing;")
    script.write_text(
        "\n".join(
            f"{version} {{ global: {''.join(f'{name}; ' for name in sorted(names) if names[name] == version)}}};"
            for version in sorted(versions)
        )
    )
    flags = ["-shared", "-fPIC", "-O0", "-w", "-nostdlib", f"-Wl,-soname,{target.name}"]
    if versions:
        flags.append(f"-Wl,--version-script={script}")
    subprocess.run(["gcc", *flags, "-o", str(target), str(source)], check=True)


def main() -> int:
    """Write the stubs that are missing; returns the exit status."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    folders = list(Path(sys.argv[1]).glob("lib/python*/site-packages/torch/lib"))
    if len(folders) != 1:
        print(f"stub_libraries: {sys.argv[1]} has {len(folders)} installations of torch, expected 1", file=sys.stderr)
        return 2
    (folder,) = folders
    libraries = [path for path in folder.iterdir() if ".so" in path.name and path.is_file() and not path.is_symlink()]
    present = {path.name for path in folder.iterdir()}
    needed, versions, wanted, defined = set(), defaultdict(set), set(), set()
    for library in libraries:
        needed |= set(re.findall(r"NEEDED.*\[(.+?)\]", said("readelf", "-dW", str(library))))
        for name, some in versions_by_library(library).items():
            versions[name] |= some
        asks, has = symbols(library)
        wanted |= asks
        defined |= has
    missing = sorted(name for name in needed - present if not name.startswith(SYSTEM))
    for name in ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"):
        path = said("gcc", f"-print-file-name={name}").strip()
        defined |= symbols(Path(path))[1]
    open_symbols = {name: version for name, version in wanted if name not in defined and not name.startswith("_Py")}
    open_symbols = {name: v for name, v in open_symbols.items() if not re.match(r"Py[A-Z]|_ITM|__gmon|__cxa", name)}
    owner = {version: name for name in missing for version in versions[name]}
    with tempfile.TemporaryDirectory() as scratch:
        for position, name in enumerate(missing):
            mine = {s: v for s, v in open_symbols.items() if owner.get(v) == name}
            if position == 0:  # a symbol without a version may stand in any of them
                mine |= {s: "" for s, v in open_symbols.items() if v not in owner}
            write_stub(folder / name, mine, versions[name], Path(scratch))
    print(f"stub_libraries: {len(missing)} libraries with {len(open_symbols)} symbols in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
