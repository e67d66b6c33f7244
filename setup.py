"""What pyproject.toml cannot say: the compiled CPU kernels are built with the package (kernels/cpu/build.py)."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))
from kernels.cpu.artifacts import LEVELS, library_path
from kernels.cpu.build import build


class BuildKernels(build_ext):
    """Built in the tree, copied to where a wheel is made. There is no Python in them: one build fits every version."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        build()
        target = Path(self.get_ext_fullpath(ext.name))
        if not self.inplace:
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(library_path(target.stem.rpartition("_")[2])), str(target))


setup(
    ext_modules=[Extension(f"kernels.cpu.{library_path(level).stem}", sources=[]) for level in LEVELS],
    cmdclass={"build_ext": BuildKernels},
)
