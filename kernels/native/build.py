"""Builds `native.cpp` as part of the package: setuptools' commands for a library that is loaded with ctypes.

Without a compiler that does (MSVC has no vector extensions), the package is installed without the library.
"""

from __future__ import annotations

from setuptools import Extension
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# No instruction set is named here: the source picks them itself, per function, and the CPU's at run time.
COMPILE_ARGS = (
    "-O3",
    "-g0",
    "-std=gnu++17",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",  # gcc's own headers of AVX-512
    "-Wno-uninitialized",
)


class BuildNative(build_ext):
    """The library is no Python module: one file for every Python, and nothing to export but what the source says."""

    def get_ext_filename(self, fullname: str) -> str:
        """Where it lies in the package."""
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """No `PyInit_` function."""
        return []

    def build_extension(self, ext: Extension) -> None:
        """Compile with gcc's or clang's options."""
        if self.compiler.compiler_type == "msvc":
            self.announce("hf_paged: no native kernel with MSVC, attention will be torch's own", level=3)
            return
        ext.extra_compile_args = [*ext.extra_compile_args, *COMPILE_ARGS]
        super().build_extension(ext)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python 3 on a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """The library does not know Python."""
        return "py3", "none", super().get_tag()[2]
