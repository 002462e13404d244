"""Drives CMakeLists.txt from pip: configures, builds with ninja, and puts the libraries into the package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()


def tool(name: str) -> str:
    """The path of cmake or ninja: from PyPI if installed, as a distribution's cmake may be too old, else from PATH."""
    try:
        module = __import__(name)
        found = Path(module.CMAKE_BIN_DIR if name == "cmake" else module.BIN_DIR) / name
        if found.exists():
            return str(found)
    except (ImportError, AttributeError):
        pass
    found = shutil.which(name)
    if found is None:
        raise CompileError(f"{name} is needed to build alexnet_ext: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Builds the libraries into the package: in the source tree for an editable install, else in the build folder."""

    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "alexnet_ext"
        package.mkdir(parents=True, exist_ok=True)
        # Kept between editable installs, so that a changed kernel recompiles one file.
        build = ROOT / "build" / "editable" if self.inplace else Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *(tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DALEXNET_EXT_OUTPUT={package}",
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        for step, command in (
            ("configure", configure),
            ("compile", [tool("cmake"), "--build", str(build), "--parallel", jobs]),
        ):
            # The compiler has printed its message. A traceback after it would only hide it.
            if subprocess.run(command, check=False).returncode:
                raise CompileError(f"alexnet_ext did not {step}: the message above says why")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-PLATFORM, as the libraries use PyTorch's stable ABI and not Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("alexnet_ext.libraries", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
