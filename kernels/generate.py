"""Writes what C++ and Triton read of the table of statistics: `python -m fastood.kernels.generate`."""

from pathlib import Path
from string import Template
from textwrap import fill

from fastood.kernels import statistics
from fastood.kernels.statistics import FORMULAS, QUANTITIES, TABLE, Statistic, Sums, rendered

NOTE = "Written by `python -m fastood.kernels.generate` from kernels/statistics.py, which says what all of this is."

LIMITS = {name: getattr(statistics, name) for name in ("FLAT_TV", "FLAT_KL", "FLAT_KL_SHARE", "UNSCALED")}

CPP = Template("""\
// $note
#pragma once

namespace fastood {

enum Sums : int { $sums };

$limits

enum class Stat : int {
  $stats
};

struct About {
  const char* name;
  int sums;
  bool infinite, is_log;
};
constexpr About ABOUT[] = {
$about
};

// Calls use(formula): formula(row) is the statistic of a row, of which `row` has the quantities.
template <class Use> void with_formula(Stat stat, Use use) {
  switch (stat) {
$cases
    default: return;
  }
}

}  // namespace fastood
""")

TRITON = Template('''\
"""$note"""
# fmt: off

import triton
import triton.language as tl

from fastood.kernels.triton.device.words import INF, log_scaled

$sums

$limits

VANISHING = tl.constexpr($vanishing)  # a bit for each statistic


@triton.jit
def formula(CODE: tl.constexpr, gap=None,
            $quantities):
    """A statistic of rows; one that vanishes with the rest in units of its weight, 2^gap. It takes its quantities."""
$branches
''')


def cpp() -> str:
    def value(formula: str) -> str:
        return rendered(formula, lambda name: f"row.{name}()", lambda x: f"row.log({value(x)})")

    def about(s: Statistic) -> str:
        sums = " | ".join(str(x.name) for x in s.sums) or "0"
        return f'    {{"{s.name}", {sums}, {str(s.infinite).lower()}, {str(s.is_log).lower()}}},'

    def case(s: Statistic) -> str:
        return f"    case Stat::{s.name}: return use([](const auto& row) {{ return {value(s.formula)}; }});"

    return CPP.substitute(
        note=NOTE,
        sums=", ".join(f"{s.name} = {s.value}" for s in Sums),
        limits="\n".join(f"constexpr double {name} = {value};" for name, value in LIMITS.items()),
        stats=fill(", ".join(s.name for s in TABLE), 110).replace("\n", "\n  "),
        about="\n".join(map(about, TABLE)),
        cases="\n".join(map(case, FORMULAS.values())),
    )


def triton() -> str:
    def value(s: Statistic) -> str:
        text = rendered(s.formula, str, lambda x: f"log_scaled({rendered(x, str, str)}, gap)")
        otherwise = "fmax" if s.infinite else 'float("nan")'
        checked = not s.sums or "fmax" in s.quantities  # what the sums do not make NaN where there is no softmax
        return f"tl.where(tl.abs(fmax) < INF, {text}, {otherwise})" if checked else text

    numbers = {s.name: i for i, s in enumerate(TABLE)}
    branches = [f"if CODE == {numbers[s.name]}:  # {s.name}\n        return {value(s)}" for s in FORMULAS.values()]
    return TRITON.substitute(
        note=NOTE,
        sums="\n".join(f"{s.name} = tl.constexpr({s.value})" for s in Sums),
        limits="\n".join(f"{name} = tl.constexpr({value})" for name, value in LIMITS.items() if name != "UNSCALED"),
        vanishing=bin(sum(s.vanishes << i for i, s in enumerate(TABLE))),
        quantities=fill(", ".join(f"{name}=None" for name in QUANTITIES), 100).replace("\n", "\n" + " " * 12),
        branches="    " + "\n    el".join(branches),
    )


KERNELS = Path(__file__).parent
WRITTEN = {KERNELS / "cpu" / "statistics.h": cpp, KERNELS / "triton" / "device" / "formulas.py": triton}

if __name__ == "__main__":
    for path, text in WRITTEN.items():
        path.write_text(text())
