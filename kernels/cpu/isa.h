// The instruction sets that this processor has, and the one in use.
#pragma once

#include <vector>

#include "plan.h"

namespace fastood {

// The best last.
std::vector<const Kernels*> supported();

extern const Kernels* kernels;

}  // namespace fastood
