"""What pyproject.toml cannot say: the top-level folder kernels/ is installed as fastood.kernels."""

from setuptools import setup

setup(
    packages=["fastood", "fastood.kernels"],
    package_dir={"fastood": "fastood", "fastood.kernels": "kernels"},
)
