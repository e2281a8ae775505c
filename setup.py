"""What pyproject.toml cannot say: kernels/ (fastood.kernels, by the link fastood/kernels) has a part in C++."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext


class SideBySide(build_ext):
    """Compiles the sources at the same time: one after the other they take a minute."""

    def build_extension(self, ext):
        one = self.compiler.compile

        def compile(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(partial(one, **options), [[source] for source in sources])
                return [name for names in objects for name in names]

        self.compiler.compile = compile
        super().build_extension(ext)


native = Extension(
    "fastood.kernels.cpu._native",
    sources=sorted(glob("kernels/**/*.cpp", recursive=True)),
    depends=sorted(glob("kernels/**/*.h", recursive=True)),
    extra_compile_args=[]
    if sys.platform == "win32"
    else ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wno-psabi", "-g0"],
    py_limited_api=True,  # one build for Python 3.11 and newer
    optional=True,  # without a compiler fastood runs on the reference backend, and fastood.backends() says why
)

setup(
    packages=find_packages(include=["fastood", "fastood.*"]),
    ext_modules=[native],
    cmdclass={"build_ext": SideBySide},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
