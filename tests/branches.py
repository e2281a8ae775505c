"""Sizes and types that the tests of Triton's kernels go through, as few as take every branch in the interpreter."""

import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def with_types(sizes, long=()):
    """Each size in float32 and in one half type, in turn; long ones, which take seconds, in one type each."""
    in_two = [(size, dtype) for i, size in enumerate(sizes) for dtype in (DTYPES[0], DTYPES[1 + i % 2])]
    return in_two + [(size, DTYPES[i % 3]) for i, size in enumerate(long)]
