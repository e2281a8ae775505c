// The kernels of one instruction set: what reduces a chunk of a row to its partial sums, room by room. Included once by each
// of rows_*.cpp, inside its own namespace and target pragma.

#include "vectors.h"

#include "elementary.h"
#include "blocks.h"

#include "softmax.h"
#include "few.h"
#include "level.h"
#include "gen.h"
#include "norms.h"
#include "gradient.h"
#include "scaling.h"
#include "batchgrad.h"

#include "arrays.h"

#define KERNELS(NAME)                                                                  \
  {NAME, VECTOR_BYTES / 4,                                                             \
   {logits<Half>, logits<BFloat>, logits<float>, logits<double>},                      \
   {tv<Half>, tv<BFloat>, tv<float>, tv<double>},                                      \
  {gradient<Half>, gradient<BFloat>, gradient<float>, gradient<double>},              \
   {level_sums<Half>, level_sums<BFloat>, level_sums<float>, level_sums<double>},      \
   {few_level_sums<Half>, few_level_sums<BFloat>, few_level_sums<float>, few_level_sums<double>}, \
   {gen<Half>, gen<BFloat>, gen<float>, gen<double>},                                  \
   {log2_rest<Half>, log2_rest<BFloat>, log2_rest<float>, log2_rest<double>},          \
   {few_logits<Half>, few_logits<BFloat>, few_logits<float>, few_logits<double>},      \
   {norms<Half>, norms<BFloat>, norms<float>, norms<double>},                          \
   {batchgrad<float>, batchgrad<double>},                                              \
   batchgrad_peak<float>,                                                              \
   {top_sums<Half>, top_sums<BFloat>, top_sums<float>, top_sums<double>},              \
   {scaled<Half>, scaled<BFloat>, scaled<float>, scaled<double>},                      \
   {exponentials<Half>, exponentials<BFloat>, exponentials<float>, exponentials<double>}, \
   {widen<Half>, widen<BFloat>, widen<float>, widen<double>},                          \
   log1p_of, power_of, exp2_of, log2_of}
