"""Which native sources an extension was built from: setup.py writes it down, the import compares.

Standard library only: setup.py runs this file before anything of the package can be imported.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(root: Path) -> str:
    """Of everything in ``root/csrc`` that the CPU core is made of, names and contents; "" where there is no csrc/."""
    found = hashlib.blake2b(digest_size=8)
    files = [path for path in (root / "csrc").glob("**/*") if path.suffix in (".cpp", ".hpp")]
    for path in sorted(files):
        found.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest() if files else ""


def stale(built: str) -> str:
    """What to do about an extension built from other sources than those beside the package; "" where all is well."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "setup.py").exists() or built == digest(root):  # an installed package has no sources to differ from
        return ""
    return (
        f"selbp's native extension was built from other sources than those in {root / 'csrc'}: "
        f"run `pip install -e {root}` again."
    )
