"""Checks a wheel: everything the packages hold is in it, nothing else is, and it imports from there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = "hf_paged_kernels/_native.so"
PACKAGES = {"hf_paged": ROOT / "hf_paged", "hf_paged_kernels": ROOT / "kernels" / "torch-ext" / "hf_paged_kernels"}


def main(folder: Path) -> None:
    """Check the one wheel in ``folder``; exit with what is wrong."""
    (wheel,) = folder.glob("*.whl")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{file.relative_to(source).as_posix()}"
        for package, source in PACKAGES.items()
        for file in source.rglob("*.py")
    }
    if shutil.which("c++"):  # without a compiler there is no library, and the wheel is right all the same
        expected.add(LIBRARY)
    if missing := expected - found:
        sys.exit(f"{wheel.name} lacks {sorted(missing)}")
    if surplus := {
        name
        for name in found - expected
        if not name.startswith(tuple(f"{p}/" for p in PACKAGES)) or name.endswith((".py", ".cpp", ".h"))
    }:
        sys.exit(f"{wheel.name} should not hold {sorted(surplus)}")
    check_import(wheel, LIBRARY in found)
    print(f"{wheel.name}: {len(found)} files, top level {sorted({name.split('/')[0] for name in found})}, imports")


def check_import(wheel: Path, has_library: bool) -> None:
    """Import the packages from the unpacked wheel, away from the checkout, and load the native kernel."""
    with tempfile.TemporaryDirectory() as scratch:
        zipfile.ZipFile(wheel).extractall(scratch)
        code = (
            f"import sys; sys.path.insert(0, {scratch!r}); import hf_paged, hf_paged_kernels;"
            f"assert hf_paged.__file__.startswith({scratch!r}), hf_paged.__file__;"
            f"assert hf_paged_kernels.__file__.startswith({scratch!r}), hf_paged_kernels.__file__;"
            "from hf_paged_kernels.native import variants, native_kernels;"
            f"assert bool(variants()) == {has_library}, variants(); print(native_kernels().reason)"
        )
        subprocess.run([sys.executable, "-c", code], cwd=scratch, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
