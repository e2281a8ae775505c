"""Written by `python -m fastood.kernels.generate` from kernels/statistics.py, which says what all of this is."""
# fmt: off

import triton
import triton.language as tl

from fastood.kernels.triton.device.words import INF, log_scaled

EXP = tl.constexpr(1)
SQUARES = tl.constexpr(2)
PLOGP = tl.constexpr(4)
SUMLOGP = tl.constexpr(8)
TV = tl.constexpr(16)
REST = tl.constexpr(32)
KL = tl.constexpr(64)

FLAT_TV = tl.constexpr(0.125)
FLAT_KL = tl.constexpr(1.0)
FLAT_KL_SHARE = tl.constexpr(0.125)

VANISHING = tl.constexpr(0b10010110000)  # a bit for each statistic


@triton.jit
def formula(CODE: tl.constexpr, gap=None,
            fmax=None, T=None, C=None, r1=None, p_max=None, log_sum=None, r2=None, mean_z=None, tv=None,
            kl_uniform=None, rest=None, rest_squares=None, rest_log=None, rest_z=None):
    """A statistic of rows; one that vanishes with the rest in units of its weight, 2^gap. It takes its quantities."""
    if CODE == 0:  # fmax
        return tl.where(tl.abs(fmax) < INF, fmax, float("nan"))
    elif CODE == 1:  # lse
        return tl.where(tl.abs(fmax) < INF, fmax / T + log_sum, fmax)
    elif CODE == 2:  # energy
        return tl.where(tl.abs(fmax) < INF, fmax + T * log_sum, fmax)
    elif CODE == 3:  # msp
        return p_max
    elif CODE == 4:  # one_minus_msp
        return rest * p_max
    elif CODE == 5:  # log_msp
        return -rest_log
    elif CODE == 6:  # s2
        return (1.0 + r2) * p_max * p_max
    elif CODE == 7:  # one_minus_s2
        return (rest * (2.0 + r1) - rest_squares) * p_max * p_max
    elif CODE == 8:  # log_one_minus_s2
        return log_scaled((rest * (2.0 + r1) - rest_squares) * p_max * p_max, gap)
    elif CODE == 9:  # tv
        return tv
    elif CODE == 10:  # plogp
        return rest_z * p_max - rest_log
    elif CODE == 11:  # sumlogp
        return C * (mean_z - log_sum)
    elif CODE == 12:  # s2_sumlogp
        return (1.0 + (1.0 + r2) * p_max * p_max) * (C * (mean_z - log_sum))
    elif CODE == 13:  # kl_uniform
        return kl_uniform
    elif CODE == 14:  # one
        return tl.where(tl.abs(fmax) < INF, 1.0, float("nan"))
    elif CODE == 15:  # uniform
        return tl.where(tl.abs(fmax) < INF, 1.0 / C, float("nan"))
