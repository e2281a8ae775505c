// What one call asks for, and the partial sums that a chunk of a row is reduced to.
// Plain data only: this header is compiled once per instruction set, and inline code in it could be
// merged by the linker into a copy that the processor does not have.
#pragma once

#include <cstdint>

#include "statistics.h"  // of whose templates softmax.cpp alone makes code

namespace fastood {

enum Type : int { FLOAT16, BFLOAT16, FLOAT32, FLOAT64, TYPES };

// A row is reduced chunk by chunk, and chunks are merged in order: the same bits on any number of threads.
constexpr int64_t CHUNK = 8192;
// Up to this many classes, a row a lane rather than a lane an element.
constexpr int64_t FEW = 48;
constexpr int MAX_ORDERS = 32;
constexpr int MAX_POWER_SUMS = 8, MAX_STATS = 32;

struct LogitsPlan {
  double temperature;
  double scale, scale_low;  // log2(e) / T in two parts
  float lowest_float;       // differences to the maximum are held no lower than this, where exp is 0 or next to it
  double lowest_double;
  int sums;         // of Sums; 0 is the maximum alone
  int power_sums;   // how many S_r
  double power[MAX_POWER_SUMS];
};

// Of a chunk, with z = (f - f_max) / T. Sums named `below` are over the elements less than f_max; the rest has ties - 1
// elements more, of e^z = 1 each.
struct LogitsState {
  double f_max;
  double ties;           // elements equal to it
  double e_below;        // below it: sum e^z
  double squares_below;  // below it: sum e^2z
  double rest_z;         // sum z e^z
  double differences;    // of all: sum (f - f_max) DIFFERENCE
  double powers_below[MAX_POWER_SUMS];  // below it: sum e^rz
  int64_t n;
  bool nan;
};

// Differences to the maximum are summed times this, for they may be beyond the doubles, as their sum may be.
constexpr double DIFFERENCE = 0x1p-64;

// Of a row read again, x = (f - level) / T - shift.
struct LevelSums {
  double expm1;  // sum of e^x - 1
  double tail;   // sum of e^x - 1 - x
  double above;  // sum of max(e^x - 1, 0)
};

// |h|^order of a normal float h = 2^e m, 1 <= m < 2, from tables as long as a vector, of 16 floats or of 8. 2^(order e) is
// looked up by the low bits of e, which tell the e of a window apart; outside of it comes a factor, by the higher bits.
// m^order is looked up by the leading bits of m, for the middle of all m that have these, times (1 + x)^order, a polynomial
// in x = m / middle - 1.
template <int LANES> struct PowerTable {
  static constexpr int BITS = LANES == 16 ? 4 : 3;  // of the mantissa
  static constexpr int WINDOW_BITS = LANES == 16 ? 5 : 6, WINDOW = 127 - 24 - (LANES == 16 ? 0 : 23);  // of the exponent
  static constexpr int DEGREE = LANES == 16 ? 3 : 4;
  float exponent[2][LANES];  // of 16: one table of 32; of 8: two factors, by three bits each
  float outside[LANES], per_middle[LANES], mantissa[LANES];
  float series[DEGREE + 1];  // (1 + x)^order = 1 + x (series[1] + x (series[2] + ...)), relative error below 2^-27
};
constexpr int TABLES_AT_ONCE = 4;

// One base power y = |h|^base costs one exp2; the orders that are small multiples of it, or 0.5 more, cost multiplications.
// The base of an order hangs on that order alone: what else is asked for must not change its bits.
struct PowerGroup {
  double base, high;  // high: its leading bits
  bool scaled;        // of |h| / unit instead of |h|
  int multiples;
  int multiple[MAX_ORDERS];
  bool rooted[MAX_ORDERS];  // times a square root
  int slot[MAX_ORDERS];  // where in NormsState.sum
};

struct NormsPlan {
  bool count;       // l0
  bool extremes;    // l0 or l_inf
  int integers;     // bits 1..6: the orders that are formed by multiplication alone, in slots 1..6
  bool scaled_integers;  // of |h| / (2 unit_whole): those of floats stay within the doubles as they are
  int groups;
  PowerGroup group[MAX_ORDERS];
  int slots;        // in use, integers included
  double order[MAX_ORDERS + 7];
  bool scaled[MAX_ORDERS + 7];
  // The small orders again, as a processor with permutations of a vector forms them: 0.5 as a square root, in slot `root`,
  // those below by tables, those above by the square root times one. Slots are 0 for what is not wanted.
  int root, tables;
  double table_order[MAX_ORDERS];
  int table_slot[MAX_ORDERS], product_slot[MAX_ORDERS];
  PowerTable<16> wide[MAX_ORDERS];
  PowerTable<8> narrow[MAX_ORDERS];
  uint64_t wanted;  // bits: the slots in use, and EXTREMES
};
constexpr uint64_t EXTREMES = 1;  // l0 or l_inf; there is no slot 0

struct NormsState {
  double max;        // max |h|; where EXTREMES are not wanted it may be less, but is infinite where |h| is
  double unit;       // what |h| is divided by where sums are scaled: max when they were last rescaled
  double shift, shift_fraction;  // its log2, whole and fraction
  double unit_whole;             // 2^shift
  double nonzero;
  double sum[MAX_ORDERS + 7];
  bool nan;
};

// A norm of the last layer's gradient, the factor that logits decide: || E_q[e_Y - p] ||_order^power or, outside,
// E_q[ || e_Y - p ||_order^power ]. LOG_PREDICTED: log p_y for q.
enum Labels : int { UNIFORM, PREDICTED, LOG_PREDICTED, GIVEN };

struct GradientPlan {
  bool wanted, outside;
  int labels;
  double order, power;
};

// What the sweep over a row for its gradient norm is told of it.
struct GradientRow {
  double f_max, total;  // total: sum e^z
  double log_total;     // log2
  double one_minus_p_max;
  double uniform;     // 1 / C
  double power_sum;   // sum of e^(order z); S_2 for order 2
  double shift;       // log2 of what the norms are divided by, so that no power leaves the range
  double log_unit;    // what log p_y is multiplied by, so that it does not
};

struct GradientState {
  double sum_below;  // outside: of q || e_y - p ||^power below the maximum
  double q_max;      // outside: sum of q over the elements equal to the maximum
  double labels;     // sum of q; NaN where one is negative
  NormsState difference;  // inside: of q - p
};

// (The first two in softmax.cpp, the third in norms.cpp, with the rest of the scalar code.)
void set_scale(LogitsPlan* plan, double scale, double scale_low);
// The plan of e^(rz).
LogitsPlan sharper(const LogitsPlan& plan, double r);

// Converts the sums to the unit `unit`.
void rescale(const NormsPlan& plan, NormsState* state, double unit);

// Where the search for a row's k-th largest number starts: where the row before had it, and how far apart its numbers
// were there. The guess saves time and changes no result.
struct Guess {
  double threshold = 0, spacing = 0;
};

struct Kernels {
  const char* name;
  int float_lanes;
  // next: what will be read after f, and is fetched on the way
  void (*logits[TYPES])(const void* f, int64_t n, const LogitsPlan& plan, const void* next, LogitsState* state, void* kept);
  // sum of max(p - uniform, 0), p = e^z / total; kept: the exponentials, where the row is one chunk
  double (*tv[TYPES])(const void* f, int64_t n, const LogitsPlan& plan, double f_max, double total, double uniform,
                      const void* kept);
  // Adds n elements to `state`; q: their labels' probabilities, of any type, where they are GIVEN; kept: as for tv.
  void (*gradient[TYPES])(const void* f, int64_t n, const void* kept, const void* q, int q_type, const LogitsPlan& plan,
                          const GradientPlan& gradient, const NormsPlan& norms, const GradientRow& row, GradientState* state);
  // LevelSums of one row that is nearly flat, so that no e^x overflows. few_level: of several rows of n <= FEW columns; the
  // results of those that are not nearly flat are meaningless, and the caller ignores them.
  void (*level[TYPES])(const void* f, int64_t stride, int64_t rows, int64_t n, double temperature, const double* level,
                       const double* shift, LevelSums* out);
  void (*few_level[TYPES])(const void* f, int64_t stride, int64_t rows, int64_t n, double temperature, const double* level,
                           const double* shift, LevelSums* out);
  double (*gen[TYPES])(const void* f, int64_t n, const LogitsPlan& plan, double f_max, double total, double rest,
                       double gamma, int64_t M);
  // log2 of the sum of e^z below the maximum, also where that vanishes.
  double (*log2_rest[TYPES])(const void* f, int64_t n, const LogitsPlan& plan, double f_max);
  // As `logits` and `tv`, of rows of n <= FEW columns.
  void (*few_logits[TYPES])(const void* f, int64_t stride, int64_t rows, int64_t n, const LogitsPlan& plan,
                            LogitsState* states, double* tv);
  void (*norms[TYPES])(const void* h, int64_t n, const NormsPlan& plan, const void* next, NormsState* state);
  // BatchGrad, in float and in double; see batchgrad.h.
  double (*batchgrad[2])(const void* h, int64_t n, const void* G, int64_t stride, const int* classes, const void* turn,
                         const void* pull, int count);
  double (*batchgrad_peak)(int64_t steps);
  // SCALE; see scaling.h.
  void (*top_sums[TYPES])(const void* h, int64_t n, int64_t k, bool relu, void* room, Guess* guess, double* all,
                          double* largest);
  double (*scaled[TYPES])(const void* f, int64_t n, double r, const void* bias, void* out);
  void (*exponentials[TYPES])(const void* f, int64_t n, const LogitsPlan& plan, double f_max, void* out);
  double (*widen[TYPES])(const void* x, int64_t n, void* out);
  // In place, of n doubles >= 0, n a multiple of 8: log (1 + x) to relative precision, and x^exponent to 2^-44.
  void (*log1p)(double* x, int64_t n);
  void (*power)(double* x, int64_t n, double exponent);
  // For tests of the error bounds: 2^x and log2 x of whole vectors.
  void (*exp2f)(const float* x, float* out, int64_t n);
  void (*log2f)(const float* x, float* out, int64_t n);
};

// Exponentials are 2^SCALED times as large as they are, so that e^-104 is a normal number; descale is 2^-SCALED.
constexpr int SCALED_FLOAT = 40, SCALED_DOUBLE = 100;

}  // namespace fastood
