// Nearly flat rows, read again from the level that their probabilities are next to. Included by rows.h.

// e^x - 1 and e^x - 1 - x, of x that no e^x overflows for.
template <class T> INLINE void exp_beside_1(V<T> x, V<T>* expm1, V<T>* tail) {
  const I<T> near = (x < 1) & (x > -1);
  *tail = exp_tail(x);
  *expm1 = x + *tail;
  if (!any<T>(~near)) return;
  const V<T> e = exp2_sum<T, true>(x * T(1.4426950408889634), V<T>{}, x != x) - 1;
  *expm1 = near ? *expm1 : e;
  *tail = near ? *tail : e - x;
}

template <class In>
static void level_sums(const void* data, int64_t, int64_t, int64_t n, double temperature, const double* level,
                       const double* shift, LevelSums* out) {
  typedef typename Arithmetic<In>::type T;
  const V<T> levels = all<T>(T(*level)), shifts = all<T>(T(*shift));
  const T per_T = T(1 / temperature);
  V<T> expm1[2] = {}, tail[2] = {}, above[2] = {};
  ExactTotal all_expm1, all_tail, all_above;
  for_blocks<2, T, 32 * Vec<T>::lanes>(
      static_cast<const In*>(data), n, T(*level),
      [&](int u, V<T> v, int64_t, int64_t first) __attribute__((always_inline)) {
        V<T> rise, beyond;
        exp_beside_1<T>((v - levels) * per_T - shifts, &rise, &beyond);
        if (first) {  // the padding is no class
          rise = from_lane<T>(first) ? rise : V<T>{};
          beyond = from_lane<T>(first) ? beyond : V<T>{};
        }
        expm1[u] += rise;
        tail[u] += beyond;
        above[u] += rise > 0 ? rise : V<T>{};
      },
      [&] { all_expm1 += take<2, T>(expm1), all_tail += take<2, T>(tail), all_above += take<2, T>(above); });
  *out = {all_expm1, all_tail, all_above};
}

template <class In>
static void few_level_sums(const void* data, int64_t stride, int64_t rows, int64_t n, double temperature,
                           const double* level, const double* shift, LevelSums* out) {
  typedef typename Arithmetic<In>::type T;
  constexpr int lanes = Vec<T>::lanes;
  const T per_T = T(1 / temperature);
  for (int64_t start = 0; start < rows; start += lanes) {
    const int64_t count = rows - start < lanes ? rows - start : lanes;
    const In* f = static_cast<const In*>(data) + start * stride;
    V<T> x[FEW], levels, shifts, expm1 = {}, tail = {}, above = {};
    for (int row = 0; row < lanes; row++) {
      const int64_t i = start + (row < count ? row : 0);
      levels[row] = T(level[i]), shifts[row] = T(shift[i]);
    }
    for (int64_t k = 0; k < n; k += lanes) load_columns<T>(f + k, stride, count, n - k < lanes ? n - k : lanes, x + k);
    for (int64_t start_of_part = 0; start_of_part < n; start_of_part += PART) {
      V<T> part_expm1 = {}, part_tail = {}, part_above = {};
      for (int64_t k = start_of_part; k < n && k < start_of_part + PART; k++) {
        V<T> rise, beyond;
        exp_beside_1<T>((x[k] - levels) * per_T - shifts, &rise, &beyond);
        part_expm1 += rise;
        part_tail += beyond;
        part_above += rise > 0 ? rise : V<T>{};
      }
      expm1 += part_expm1, tail += part_tail, above += part_above;
    }
    for (int64_t row = 0; row < count; row++) out[start + row] = {double(expm1[row]), double(tail[row]), double(above[row])};
  }
}
