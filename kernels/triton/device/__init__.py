"""The kernels themselves, in Triton. Imported only where a CUDA tensor (or the interpreter) asks for them."""

from fastood.kernels.triton.device import batchgrad, gen, gradient, linear, scaling, scores

__all__ = ["batchgrad", "gen", "gradient", "linear", "scaling", "scores"]
