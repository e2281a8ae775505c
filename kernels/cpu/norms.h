// Norms of a row of features. Included by rows.h.

template <int P, class T> INLINE V<T> integer_power(V<T> x) {
  if constexpr (P == 1) return x;
  else if constexpr (P % 2) return integer_power<P / 2, T>(x) * integer_power<P / 2, T>(x) * x;
  else return integer_power<P / 2, T>(x) * integer_power<P / 2, T>(x);
}

// Sum of y^P, or where there are roots of their products with those.
template <int P, class T> static double sum_of_powers(const T* y, const T* roots, int64_t n) {
  V<T> sums[4] = {}, total = {};
  for_blocks<4, T>(
      y, n, T(0),
      [&](int u, V<T> v, int64_t i, int64_t) __attribute__((always_inline)) {
        const V<T> power = integer_power<P, T>(v);
        sums[u] = roots ? fused(power, load(roots + i), sums[u]) : sums[u] + power;
      },
      [&] { add_up<4, T>(&total, sums); });
  return sum_of<T>(total);
}

template <class T> static double sum_of_powers(const T* y, const T* roots, int64_t n, int p) {
  switch (p) {
    case 1: return sum_of_powers<1, T>(y, roots, n);
    case 2: return sum_of_powers<2, T>(y, roots, n);
    case 3: return sum_of_powers<3, T>(y, roots, n);
    default: return sum_of_powers<4, T>(y, roots, n);
  }
}

// Sums of the integer powers 1..MOST of a s1 s2 in one pass; those that are `wanted` are added, times unit^p.
template <int MOST, class T>
static void integer_sums(const T* a, int64_t n, T s1, T s2, uint64_t wanted, double unit, double* sum) {
  constexpr int W = 2;
  V<T> s[MOST][W] = {}, total[MOST] = {};
  for_blocks<W, T>(
      a, n, T(0),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
        V<T> y = v * s1 * s2;
        s[0][u] += y;
        if constexpr (MOST >= 2) s[1][u] = fused(y, y, s[1][u]);
        if constexpr (MOST >= 3) {
          V<T> y2 = y * y, y3 = y2 * y;
          s[2][u] += y3;
          s[3][u] += y2 * y2;
          s[4][u] += y2 * y3;
          s[5][u] += y3 * y3;
        }
      },
      [&] { UNROLL for (int p = 0; p < MOST; p++) add_up<W, T>(&total[p], s[p]); });
  double unit_power = 1;
  for (int p = 0; p < MOST; p++) {
    unit_power *= unit;
    if (wanted >> (p + 1) & 1) sum[p + 1] += unit_power * sum_of<T>(total[p]);
  }
}

// Sums of y^multiple, y = |h|^base, times the square root of |h| if that is asked for, of the slots of a group that are
// wanted. ROOTED: of some it is.
template <class T, bool SCALED, bool ROOTED>
static void group_sums(const T* a, int64_t padded, const PowerGroup& group, uint64_t wanted, const NormsState& s,
                       double* sum) {
  // base = high + low, high so short that its product with an exponent is exact
  const T base = T(group.base), high = T(group.high), low = T(group.base - double(high));
  const T shift = T(s.shift), shift_fraction = T(s.shift_fraction);
  T power[BLOCK], root[BLOCK];
  bool powers = false;
  for (int j = 0; j < group.multiples; j++) powers |= group.multiple[j] && wanted >> group.slot[j] & 1;
  V<T> sums[4] = {}, total = {}, roots[4] = {}, all_roots = {};
  for_blocks<4, T>(
      a, padded, T(0),
      [&](int u, V<T> v, int64_t i, int64_t) __attribute__((always_inline)) {
        if constexpr (ROOTED) {
          const V<T> square = square_root(v);
          __builtin_memcpy(root + i, &square, sizeof square);
          roots[u] += square;
          if (!powers) return;
        }
        V<T> whole, part;
        log2_parts<T>(v, &whole, &part);
        if constexpr (SCALED) {
          whole -= shift;
          part -= shift_fraction;
        }
        V<T> y = exp2_sum<T, SCALED>(whole * high, whole * low + part * base, v == 0);
        if (!SCALED) __builtin_memcpy(power + i, &y, sizeof y);
        sums[u] += y;
      },
      [&] {
        add_up<4, T>(&total, sums);
        if constexpr (ROOTED) add_up<4, T>(&all_roots, roots);
      });
  for (int j = 0; j < group.multiples; j++) {
    if (!(wanted >> group.slot[j] & 1)) continue;
    if (group.multiple[j] == 0) sum[group.slot[j]] += sum_of<T>(all_roots);
    else if (group.multiple[j] == 1 && !group.rooted[j]) sum[group.slot[j]] += sum_of<T>(total);
    else sum[group.slot[j]] += sum_of_powers<T>(power, group.rooted[j] ? root : nullptr, padded, group.multiple[j]);
  }
}

template <class T>
static void group_sums(const T* a, int64_t padded, const PowerGroup& group, uint64_t wanted, const NormsState& s,
                       double* sum) {
  bool some = false, rooted = false;
  for (int j = 0; j < group.multiples; j++) {
    if (!(wanted >> group.slot[j] & 1)) continue;
    some = true;
    rooted |= group.rooted[j];
  }
  if (!some) return;
  if (group.scaled) group_sums<T, true, false>(a, padded, group, wanted, s, sum);
  else if (rooted) group_sums<T, false, true>(a, padded, group, wanted, s, sum);
  else group_sums<T, false, false>(a, padded, group, wanted, s, sum);
}

// |h| of a tile, with its maximum, whether there is a NaN, and how many are not zero.
template <class T, bool COUNT, class In> static void read_tile(const In* h, int64_t m, T* a, NormsState* state, double* max) {
  V<T> most[4] = {}, nonzero[4] = {};
  I<T> nan[4] = {};
  for_blocks<4, T>(
      h, m, T(0),
      [&](int u, V<T> v, int64_t i, int64_t) __attribute__((always_inline)) {
        v = (V<T>)((U<T>)v << 1 >> 1);
        __builtin_memcpy(a + i, &v, sizeof v);
        most[u] = v > most[u] ? v : most[u];
        nan[u] |= v != v;
        if constexpr (COUNT) nonzero[u] += v == 0 ? V<T>{} : all<T>(T(1));
      },
      [] {});
  V<T> largest = most[0];
  UNROLL for (int u = 1; u < 4; u++) {
    largest = most[u] > largest ? most[u] : largest;
    nan[0] |= nan[u];
  }
  *max = max_of<T>(largest);
  state->nan |= any<T>(nan[0]);
  if constexpr (COUNT) state->nonzero += take<4, T>(nonzero);
}

// What is wanted of any chunk of any row, tile by tile.
template <class T, class In>
static void norms_by_tiles(const In* h, int64_t n, const NormsPlan& plan, uint64_t wanted, NormsState* state) {
  T a[BLOCK];
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t m = n - start < BLOCK ? n - start : BLOCK;
    const int64_t padded = (m + Vec<T>::lanes - 1) / Vec<T>::lanes * Vec<T>::lanes;  // the rest is zeros
    double max;
    if (plan.count && wanted & EXTREMES) read_tile<T, true>(h + start, m, a, state, &max);
    else read_tile<T, false>(h + start, m, a, state, &max);
    state->max = max > state->max ? max : state->max;
    if (max == 0 || max == __builtin_inf() || state->nan) continue;
    if (max > state->unit) rescale(plan, state, max);

    const uint64_t integers = wanted & 0x7e;
    if (integers) {
      const int k = -int(state->shift) - 1, k1 = k < -126 ? -126 : k > 126 ? 126 : k;
      const T s1 = T(__builtin_ldexp(1.0, k1)), s2 = T(__builtin_ldexp(1.0, k - k1));
      const double unit = plan.scaled_integers ? 1 : 2 * state->unit_whole;
      if (integers >> 3) integer_sums<6, T>(a, padded, s1, s2, integers, unit, state->sum);
      else if (integers >> 2) integer_sums<2, T>(a, padded, s1, s2, integers, unit, state->sum);
      else integer_sums<1, T>(a, padded, s1, s2, integers, unit, state->sum);
    }
    for (int g = 0; g < plan.groups; g++) group_sums<T>(a, padded, plan.group[g], wanted, *state, state->sum);
  }
}

#if VECTOR_BYTES >= 32
// As for_blocks, but each accumulator has a block of its own, side by side: sums that are added up in the order of the
// blocks are the same for any WIDTH.
template <int WIDTH, class T, int64_t LENGTH, class In, class Step, class Flush>
INLINE void for_blocks_abreast(const In* x, int64_t n, T padding, Step step, Flush flush) {
  constexpr int64_t lanes = Vec<T>::lanes;
  for (int64_t start = 0; start < n; start += WIDTH * LENGTH) {
    if (start + WIDTH * LENGTH <= n) {
      for (int64_t i = start; i < start + LENGTH; i += lanes) {
        UNROLL for (int u = 0; u < WIDTH; u++) step(u, load(x + i + u * LENGTH), i + u * LENGTH, 0);
      }
    } else {
      UNROLL for (int u = 0; u < WIDTH; u++) {
        int64_t i = start + u * LENGTH;
        const int64_t end = i + LENGTH < n ? i + LENGTH : n;
        for (; i + lanes <= end; i += lanes) step(u, load(x + i), i, 0);
        if (i < end) step(u, load_last<T>(x + end, end - i, i, padding), i, lanes - (end - i));
      }
    }
    flush();
  }
}

template <int WIDTH, class T> INLINE void add_in_turn(V<T>* total, V<T>* sums) {
  UNROLL for (int u = 0; u < WIDTH; u++) {
    *total += sums[u];
    sums[u] = V<T>{};
  }
}

// One pass over at most SPAN elements, which sums TABLES fractional powers, by the tables from `first` on, and their
// products with square roots; the pass with the first table also sums the square roots and the integer powers up to
// INTEGERS and, where that is 6, finds the extremes.
//
// Returns the slots that it has added to, and EXTREMES. What it returns no bit of, norms_by_tiles has to do: the powers by
// tables, where an element is subnormal, infinite or NaN; any other order whose sum is infinite or NaN, or too small to be
// precise. One order's failure does not send another to norms_by_tiles, which rounds otherwise: the bits of an order must
// not depend on which others are asked for.
constexpr int64_t SPAN = 2048;

template <int TABLES, int INTEGERS, bool PRODUCTS, class In>
static uint64_t norms_at_once(const In* h, int64_t n, const NormsPlan& plan, int first, const In* next, NormsState* state) {
  typedef V<float> F;
  typedef PowerTable<Vec<float>::lanes> Table;
  constexpr int W = TABLES < 2 && INTEGERS < 6 ? 2 : 1;
  constexpr int EXPONENT = 23 + Table::WINDOW_BITS, MANTISSA = 23 - Table::BITS;  // the bits above these are a place in a table
#if VECTOR_BYTES == 64
  const Table* table = plan.wide + first;
#else
  const Table* table = plan.narrow + first;
#endif
  const F per_middle = load(table[0].per_middle);
  const int* product_slot = plan.product_slot + first;
  bool multiplied = false;
  for (int k = 0; k < TABLES && PRODUCTS; k++) multiplied |= product_slot[k] != 0;
  const bool rooted = plan.root || multiplied;
  F low[TABLES + 1], high[TABLES + 1], mantissa[TABLES + 1];
  F power[TABLES + 1][W] = {}, product[TABLES + 1][W] = {}, root[W] = {}, integer[INTEGERS + 1][W] = {};
  F all_power[TABLES + 1] = {}, all_product[TABLES + 1] = {}, all_root = {}, all_integer[INTEGERS + 1] = {}, most = {}, nonzero = {};
  UNROLL for (int k = 0; k < TABLES; k++) {
    low[k] = load(table[k].exponent[0]);
    high[k] = load(table[k].exponent[1]);
    mantissa[k] = load(table[k].mantissa);
  }
  typename MaskOf<float>::type special{};
  for_blocks_abreast<W, float, 256>(
      h, n, 0.0f,
      [&](int u, F v, int64_t i, int64_t) __attribute__((always_inline)) {
        __builtin_prefetch(next + i);
        const I<float> bits = (I<float>)v, magnitude = bits & 0x7fffffff;
        const F a = (F)magnitude;
        const auto some = unequal(a, F{});
        F square = {};
        if (rooted) root[u] += square = square_root(a);
        if constexpr (TABLES > 0) {
          F of_exponent[TABLES];
          UNROLL for (int k = 0; k < TABLES; k++) of_exponent[k] = exponent_power(low[k], high[k], bits >> 23);
          const I<float> above = magnitude - (Table::WINDOW << 23);
          if (__builtin_expect(any_where(some, above, -1u << EXPONENT), 0)) {
            special |= special_numbers(v);
            UNROLL for (int k = 0; k < TABLES; k++) of_exponent[k] *= choose(load(table[k].outside), above >> EXPONENT);
          }
          const F m = (F)((bits & 0x007fffff) | 0x3f800000);
          const F x = m * choose(per_middle, bits >> MANTISSA) - 1.0f;
          F kept[TABLES];
          UNROLL for (int k = 0; k < TABLES; k++) {
            const F c = choose(mantissa[k], bits >> MANTISSA);
            F series = all<float>(table[k].series[Table::DEGREE]);
            UNROLL for (int d = Table::DEGREE - 1; d > 0; d--) series = fused(series, x, all<float>(table[k].series[d]));
            power[k][u] += kept[k] = where(some, of_exponent[k] * fused(c * x, series, c));
          }
          if (PRODUCTS && multiplied)
            UNROLL for (int k = 0; k < TABLES; k++)
              if (product_slot[k]) product[k][u] = fused(kept[k], square, product[k][u]);
        }
        if constexpr (INTEGERS > 0) {
          integer[0][u] += a;
          integer[1][u] = fused(a, a, integer[1][u]);
        }
        if constexpr (INTEGERS == 6) {
          const F a2 = a * a, a3 = a2 * a;
          integer[2][u] += a2 * a;
          integer[3][u] += a2 * a2;
          integer[4][u] += a3 * a2;
          integer[5][u] += a3 * a3;
          most = larger(a, most);
          nonzero = add_where(some, nonzero, all<float>(1.0f));
        }
      },
      [&] {
        UNROLL for (int k = 0; k < TABLES; k++) {
          add_in_turn<W, float>(&all_power[k], power[k]);
          if (PRODUCTS) add_in_turn<W, float>(&all_product[k], product[k]);
        }
        add_in_turn<W, float>(&all_root, root);
        UNROLL for (int p = 0; p < INTEGERS; p++) add_in_turn<W, float>(&all_integer[p], integer[p]);
      });
  uint64_t done = 0;
  auto add = [&](int slot, double sum) {
    state->sum[slot] += sum;
    done |= uint64_t(1) << slot;
  };
  const double roots = sum_of<float>(all_root);
  if (plan.root && first == 0 && roots < __builtin_inf()) add(plan.root, roots);
  for (int k = 0; k < TABLES && !any<float>(special); k++) {
    if (plan.table_slot[first + k]) add(plan.table_slot[first + k], sum_of<float>(all_power[k]));
    if (product_slot[k]) add(product_slot[k], sum_of<float>(all_product[k]));
  }
  if constexpr (INTEGERS > 0) {
    const double all_of_them = sum_of<float>(all_integer[0]);
    for (int p = 1; p <= INTEGERS; p++) {
      const double sum = sum_of<float>(all_integer[p - 1]);
      // What underflows in a power then counts for nothing in its sum.
      if (all_of_them == 0 || (sum >= 0x1p-70 && sum < __builtin_inf())) add(p, sum);
    }
    if (INTEGERS == 6 && all_of_them < __builtin_inf()) {
      const double max = max_of<float>(most);
      state->max = max > state->max ? max : state->max;
      state->nonzero += sum_of<float>(nonzero);
      done |= EXTREMES;
    }
  }
  return done;
}

template <class In> using AtOnce = uint64_t (*)(const In*, int64_t, const NormsPlan&, int, const In*, NormsState*);

template <int INTEGERS, class In> static AtOnce<In> with_tables(const NormsPlan& plan, int first) {
  switch (plan.tables - first) {
    case 0: return norms_at_once<0, INTEGERS, false, In>;
    case 1: return plan.product_slot[first] ? norms_at_once<1, INTEGERS, true, In> : norms_at_once<1, INTEGERS, false, In>;
    case 2: return norms_at_once<2, INTEGERS, true, In>;
    case 3: return norms_at_once<3, INTEGERS, true, In>;
    default: return norms_at_once<TABLES_AT_ONCE, INTEGERS, true, In>;
  }
}
#endif

template <class In>
static void norms(const void* data, int64_t n, const NormsPlan& plan, const void* next, NormsState* state) {
  typedef typename Arithmetic<In>::type T;
  const In* h = static_cast<const In*>(data);
#if VECTOR_BYTES >= 32
  if constexpr (sizeof(T) == 4) {
    if (plan.tables || plan.root || plan.integers) {
      const AtOnce<In> at_once = plan.extremes || plan.integers >> 3 ? with_tables<6, In>(plan, 0)
                                 : plan.integers                     ? with_tables<2, In>(plan, 0)
                                                                     : with_tables<0, In>(plan, 0);
      for (int64_t start = 0; start < n; start += SPAN) {
        const int64_t m = n - start < SPAN ? n - start : SPAN;
        const In* after = static_cast<const In*>(next) + start;
        uint64_t done = at_once(h + start, m, plan, 0, after, state);
        for (int first = TABLES_AT_ONCE; first < plan.tables; first += TABLES_AT_ONCE)
          done |= with_tables<0, In>(plan, first)(h + start, m, plan, first, after, state);
        if (plan.wanted & ~done) norms_by_tiles<T>(h + start, m, plan, plan.wanted & ~done, state);
      }
      return;
    }
  }
#endif
  norms_by_tiles<T>(h, n, plan, plan.wanted, state);
}
