"""What pyproject.toml cannot say: kernels/ (fastood.kernels, by the link fastood/kernels) has a part in C++."""

import sys
from glob import glob

from setuptools import Extension, find_packages, setup

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
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
