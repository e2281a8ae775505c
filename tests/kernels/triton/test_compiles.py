"""Programs that compile the kernels ahead of time, for GPUs that are not there; benchmarks/gpu_static.py does more."""

import shutil

import program
import pytest
from interpreter import needs_triton, only_compiled

from fastood.kernels.cpu import _native

pytestmark = [needs_triton, only_compiled]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_compiles_ahead_of_time(architecture):
    """What benchmarks/gpu_static.py does not compile: rare statistics, orders and types; and for AMD, scores."""
    program.run("ahead_of_time", architecture)


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_no_helper_needs_its_tuples_told_apart(which):
    """Triton 3.6 names what it compiles by the tensors and constants in the arguments, whatever tuples they are in:
    called with ((x, y),) and with ((x,), (y,)) a helper has one body, and the second call's sums are wrong.
    """
    program.run("tuples", which, TRITON_ALWAYS_COMPILE="1")


@pytest.mark.skipif(_native is None, reason="needs the C++ part")
def test_arguments_are_packed_as_the_compiled_kernels_take_them():
    program.run("packed")


def test_reductions_have_one_layout_wherever_rows_begin():
    """The order of a sum is that of the layout which the compiler gives a tile, and it hangs on the width of loads."""
    program.run("layouts")


def test_a_cache_that_was_shipped_serves_at_its_old_path(tmp_path):
    """There alone: what Triton keeps there says where it lies."""
    there = tmp_path / "cache"
    assert program.run("shipped_cache", TRITON_CACHE_DIR=str(there)) == "compiled\n"
    shutil.move(there, tmp_path / "shipped")
    shutil.copytree(tmp_path / "shipped", there)
    shutil.rmtree(tmp_path / "shipped")
    assert program.run("shipped_cache", TRITON_CACHE_DIR=str(there)) == "found\n"
