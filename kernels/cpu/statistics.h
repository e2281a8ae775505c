// Written by `python -m fastood.kernels.generate` from kernels/statistics.py, which says what all of this is.
#pragma once

namespace fastood {

enum Sums : int { EXP = 1, SQUARES = 2, PLOGP = 4, SUMLOGP = 8, TV = 16, REST = 32, KL = 64 };

constexpr double FLAT_TV = 0.125;
constexpr double FLAT_KL = 1.0;
constexpr double FLAT_KL_SHARE = 0.125;
constexpr double UNSCALED = 0.84;

enum class Stat : int {
  fmax, lse, energy, msp, one_minus_msp, log_msp, s2, one_minus_s2, log_one_minus_s2, tv, plogp, sumlogp,
  s2_sumlogp, kl_uniform, one, uniform, power_sum, gen, gradient
};

struct About {
  const char* name;
  int sums;
  bool infinite, is_log;
};
constexpr About ABOUT[] = {
    {"fmax", 0, false, false},
    {"lse", EXP, true, false},
    {"energy", EXP, true, false},
    {"msp", EXP, false, false},
    {"one_minus_msp", EXP | REST, false, false},
    {"log_msp", EXP | REST, false, false},
    {"s2", EXP | SQUARES, false, false},
    {"one_minus_s2", EXP | SQUARES | REST, false, false},
    {"log_one_minus_s2", EXP | SQUARES | REST, false, true},
    {"tv", EXP | TV, false, false},
    {"plogp", EXP | PLOGP | REST, false, false},
    {"sumlogp", EXP | SUMLOGP, false, false},
    {"s2_sumlogp", EXP | SQUARES | SUMLOGP, false, false},
    {"kl_uniform", EXP | SUMLOGP | KL, false, false},
    {"one", 0, false, false},
    {"uniform", 0, false, false},
    {"power_sum", EXP, false, false},
    {"gen", EXP, false, false},
    {"gradient", EXP, false, false},
};

// Calls use(formula): formula(row) is the statistic of a row, of which `row` has the quantities.
template <class Use> void with_formula(Stat stat, Use use) {
  switch (stat) {
    case Stat::fmax: return use([](const auto& row) { return row.fmax(); });
    case Stat::lse: return use([](const auto& row) { return row.fmax() / row.T() + row.log_sum(); });
    case Stat::energy: return use([](const auto& row) { return row.fmax() + row.T() * row.log_sum(); });
    case Stat::msp: return use([](const auto& row) { return row.p_max(); });
    case Stat::one_minus_msp: return use([](const auto& row) { return row.rest() * row.p_max(); });
    case Stat::log_msp: return use([](const auto& row) { return -row.rest_log(); });
    case Stat::s2: return use([](const auto& row) { return (1.0 + row.r2()) * row.p_max() * row.p_max(); });
    case Stat::one_minus_s2: return use([](const auto& row) { return (row.rest() * (2.0 + row.r1()) - row.rest_squares()) * row.p_max() * row.p_max(); });
    case Stat::log_one_minus_s2: return use([](const auto& row) { return row.log((row.rest() * (2.0 + row.r1()) - row.rest_squares()) * row.p_max() * row.p_max()); });
    case Stat::tv: return use([](const auto& row) { return row.tv(); });
    case Stat::plogp: return use([](const auto& row) { return row.rest_z() * row.p_max() - row.rest_log(); });
    case Stat::sumlogp: return use([](const auto& row) { return row.C() * (row.mean_z() - row.log_sum()); });
    case Stat::s2_sumlogp: return use([](const auto& row) { return (1.0 + (1.0 + row.r2()) * row.p_max() * row.p_max()) * (row.C() * (row.mean_z() - row.log_sum())); });
    case Stat::kl_uniform: return use([](const auto& row) { return row.kl_uniform(); });
    case Stat::one: return use([](const auto& row) { return 1.0; });
    case Stat::uniform: return use([](const auto& row) { return 1.0 / row.C(); });
    default: return;
  }
}

}  // namespace fastood
