"""What pyproject.toml cannot say: kernels/ (fastood.kernels, by the link fastood/kernels) has a part in C++."""

import sys

from setuptools import Extension, setup

native = Extension(
    "fastood.kernels.cpu._native",
    sources=[
        "kernels/tensors.cpp",
        "kernels/triton/launcher.cpp",
        *(
            f"kernels/cpu/{name}.cpp"
            for name in ("module", "run", "gradient", "batchgrad", "state", "rows_base", "rows_avx2", "rows_avx512")
        ),
    ],
    depends=[
        "kernels/tensors.h",
        "kernels/triton/launcher.h",
        *(
            f"kernels/cpu/{name}.h"
            for name in ("statistics", "plan", "state", "run", "vectors", "rows", "gradient", "batchgrad")
        ),
    ],
    extra_compile_args=[]
    if sys.platform == "win32"
    else ["-std=c++17", "-O3", "-fvisibility=hidden", "-Wno-psabi", "-g0"],
    py_limited_api=True,  # one build for Python 3.11 and newer
    optional=True,  # without a compiler fastood runs on the reference backend, and fastood.backends() says why
)

setup(
    packages=[
        "fastood",
        "fastood.kernels",
        "fastood.kernels.cpu",
        "fastood.kernels.triton",
        "fastood.kernels.triton.device",
        "fastood.reproduce",
    ],
    ext_modules=[native],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
