"""Builds the C++ part (`pocl_fast._C`) with CMake, and lists the packages; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """`build_ext` that hands the whole extension to CMake."""

    def build_extension(self, ext: Extension) -> None:
        compiler = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
        if not any(shutil.which(name) for name in compiler):
            chosen = f"CXX is {compiler[0]}, which is not there" if len(compiler) == 1 else "no C++ compiler found"
            sys.exit(
                f"pocl-fast: {chosen}. Install g++ 10 or newer (Debian: apt-get install g++), and leave CXX unset or"
                " set it to a compiler."
            )
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPOCL_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPOCL_WARNINGS_AS_ERRORS={'ON' if os.environ.get('POCL_WERROR') else 'OFF'}",
        ]  # fmt: skip
        for command in (configure, ["cmake", "--build", str(build)]):
            try:
                subprocess.run(command, check=True)
            except FileNotFoundError:
                sys.exit(
                    "pocl-fast: cmake was not found. Build with `pip install .`,"
                    " or `pip install cmake ninja pybind11` first."
                )
            except subprocess.CalledProcessError as error:
                sys.exit(
                    f"pocl-fast: the C++ build failed (`{' '.join(command[:3])} ...` gave {error.returncode});"
                    " the compiler's message is above. Needed: a C++20 compiler (g++ 10+ or clang++ 12+) and"
                    " Python's headers (Debian: apt-get install g++ python3-dev)."
                )


setup(
    packages=[*find_packages(include=["pocl_fast", "pocl_fast.*"]), "pocl_fast.kernels"],  # a new room is in the wheel
    ext_modules=[Extension("pocl_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
