// SCALE and its kin: the sum of a row of features and that of its k largest, and logits scaled by what comes of them.
// Included by rows.h.

// Bits of a float that an input type leaves 0.
template <class In> constexpr int NARROW = 0;
template <> constexpr int NARROW<Half> = 13;
template <> constexpr int NARROW<BFloat> = 16;

// The smallest number that reaches `threshold`.
template <class T> static T smallest_from(const T* h, int64_t n, T threshold) {
  V<T> least[2] = {all<T>(T(__builtin_inf())), all<T>(T(__builtin_inf()))};
  for_blocks<2, T, int64_t(1) << 40>(
      h, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
        least[u] = v >= threshold && v < least[u] ? v : least[u];
      },
      [] {});
  return -max_of<T>(larger(-least[0], -least[1]));
}

// A threshold that k of n numbers reach, 1 <= k < n, and no more: *reach is k then. Where numbers equal to the k-th largest
// make that impossible, the k-th largest itself, which *reach > k numbers reach. The search starts at guess->threshold,
// which `count` numbers reach, and leaves in *guess where the next row's starts.
template <class T, int STEP>
static T top_threshold(const T* h, int64_t n, int64_t k, int64_t count, Guess* guess, int64_t* reach) {
  typedef typename Vec<T>::Scalar S;
  S low = place_of(minus_inf<T>()) >> STEP, high = place_of(T(__builtin_inf())) >> STEP;
  const auto value = [](S place) { return float_at<T>(S(typename Vec<T>::Unsigned(place) << STEP)); };
  int64_t from_low = n, from_high = 0;  // more than k reach `low`, less than k `high`
  T threshold = T(guess->threshold);
  S place = place_of(threshold) >> STEP;
  for (int step = 0; count != k; step++) {
    if (count > k) low = place, from_low = count;
    else high = place, from_high = count;
    if (low >= high - 1) {
      guess->threshold = value(low);
      *reach = from_low;
      return value(low);
    }
    // The next number, if that is it; from one side by the spacing of the row before; between two in proportion; and now
    // and then in the middle, for what is not spread evenly.
    const T least = value(low), most = value(high);
    if (from_low < n && from_high > 0) guess->spacing = double(most - least) / double(from_low - from_high);
    const bool between = from_low < n && from_high > 0;
    if (between && from_high == k - 1) threshold = largest_below<T>(h, n, most);
    else if (between && from_low == k + 1) threshold = float_at<T>(place_of(smallest_from<T>(h, n, least)) + (S(1) << STEP));
    else if (step % 4 == 3) threshold = least;
    else if (!between) threshold += T(guess->spacing * (double(count - k) * 1.25));
    else threshold = least + T((double(from_low - k) - 0.5) * guess->spacing);
    place = place_of(threshold) >> STEP;
    if (!(place > low && place < high)) place = S((low & high) + ((low ^ high) >> 1));
    threshold = value(place);
    count = count_at_least<T>(h, n, threshold);
  }
  guess->threshold = threshold;
  *reach = k;
  return threshold;
}

// sum h and the sum of its k largest; of max(h, 0) where relu. NaN where a number is not finite. room: for n numbers.
template <class In>
static void top_sums(const void* data, int64_t n, int64_t k, bool relu, void* room, Guess* guess, double* all_sum,
                     double* top_sum) {
  typedef typename Arithmetic<In>::type T;
  T* h = static_cast<T*>(room);
  const V<T> least = all<T>(relu ? T(0) : minus_inf<T>()), guessed = all<T>(T(guess->threshold));
  V<T> sums[4] = {}, odd[4] = {};
  I<T> count[4] = {};
  Total total;
  for_blocks<4, T>(
      static_cast<const In*>(data), n, T(0),
      [&](int u, V<T> v, int64_t i, int64_t first) __attribute__((always_inline)) {
        odd[u] += v - v;
        v = larger(v, least);
        sums[u] += v;
        count[u] = count_where(at_least(v, guessed), count[u]);
        store<T>(h, v, i, first);
      },
      [&] { total += take<4, T>(sums); });
  *all_sum = *top_sum = total + double(take<4, T>(odd));
  if (k >= n || *all_sum != *all_sum) return;
  const int64_t padding = guess->threshold > 0 ? 0 : -n & (Vec<T>::lanes - 1);  // zeros that fill the last vector
  const int64_t reached = count_of<T>((count[0] + count[1]) + (count[2] + count[3])) - padding;
  int64_t reach;
  const T threshold = top_threshold<T, NARROW<In>>(h, n, k, reached, guess, &reach);
  // Where too many reach the threshold, what is equal to it is left out, and counted below.
  const V<T> from = all<T>(reach == k ? threshold : float_at<T>(place_of(threshold) + 1));
  V<T> largest[4] = {};
  Total of_largest;
  for_blocks<4, T>(
      h, n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t, int64_t) __attribute__((always_inline)) {
        largest[u] = add_where(at_least(v, from), largest[u], v);
      },
      [&] { of_largest += take<4, T>(largest); });
  *top_sum = reach == k ? of_largest : of_largest + double(k - count_at_least<T>(h, n, from[0])) * double(threshold);
}

// r (f - bias) + bias, a masked class staying one, and the largest f; bias may be null for 0.
template <class In> static double scaled(const void* data, int64_t n, double r, const void* bias, void* out) {
  typedef typename Arithmetic<In>::type T;
  const T* b = static_cast<const T*>(bias);
  T* to = static_cast<T*>(out);
  V<T> most[4];
  UNROLL for (int u = 0; u < 4; u++) most[u] = all<T>(minus_inf<T>());
  for_blocks<4, T>(
      static_cast<const In*>(data), n, minus_inf<T>(),
      [&](int u, V<T> v, int64_t i, int64_t first) __attribute__((always_inline)) {
        V<T> x = {};
        if (b && first == 0) __builtin_memcpy(&x, b + i, sizeof x);
        else if (b)
          for (int64_t k = first; k < Vec<T>::lanes; k++) x[k] = b[i + k - first];
        most[u] = larger(v, most[u]);
        const V<T> y = v == minus_inf<T>() ? v : (v - x) * T(r) + x;
        store<T>(to, y, i, first);
      },
      [] {});
  return max_of<T>(larger(larger(most[0], most[1]), larger(most[2], most[3])));
}
