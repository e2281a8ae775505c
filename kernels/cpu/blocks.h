// How a row is read: by blocks, of which each adds up in a few accumulators. Included by rows.h.

// Calls step(u, v, i, first) on every vector of x: u < WIDTH the accumulator to use, i where it begins, `first`
// its first lane that counts, 0 but in a last vector that is not full; flush() after each LENGTH elements, so that
// no lane's sum grows long.
constexpr int64_t BLOCK = 512;

template <class T, int WIDTH>
constexpr int64_t SHORT = 32 * WIDTH * Vec<T>::lanes < BLOCK ? 32 * WIDTH * Vec<T>::lanes : BLOCK;

template <int WIDTH, class T, int64_t LENGTH = SHORT<T, WIDTH>, class In, class Step, class Flush>
INLINE void for_blocks(const In* x, int64_t n, T padding, Step step, Flush flush) {
  constexpr int64_t lanes = Vec<T>::lanes;
  for (int64_t i = 0; i < n;) {
    const int64_t end = i + LENGTH < n ? i + LENGTH : n;
    for (; i + WIDTH * lanes <= end; i += WIDTH * lanes) {
      UNROLL for (int u = 0; u < WIDTH; u++) step(u, load(x + i + u * lanes), i + u * lanes, 0);
    }
    // The last vectors go to the accumulators in turn, full or not: a padded copy of the row sums in the same order.
    UNROLL for (int u = 0; u < WIDTH; u++) {
      if (i + lanes <= end) {
        step(u, load(x + i), i, 0);
        i += lanes;
      } else if (i < end) {
        step(u, load_last<T>(x + end, end - i, i, padding), i, lanes - (end - i));
        i = end;
      }
    }
    flush();
  }
}

// Writes what `step` was given of a row, those lanes that count.
template <class T> INLINE void store(T* to, V<T> v, int64_t i, int64_t first) {
  if (first == 0) __builtin_memcpy(to + i, &v, sizeof v);
  else
    for (int64_t k = first; k < Vec<T>::lanes; k++) to[i + k - first] = v[k];
}

// Adds the accumulators of a block to a running total and clears them.
template <int WIDTH, class T> INLINE void add_up(V<T>* total, V<T>* sums) {
  V<T> sum = sums[0];
  UNROLL for (int u = 1; u < WIDTH; u++) sum += sums[u];
  UNROLL for (int u = 0; u < WIDTH; u++) sums[u] = V<T>{};
  *total += sum;
}

template <int WIDTH, class T> INLINE double take(V<T>* sums) {
  V<T> total = {};
  add_up<WIDTH, T>(&total, sums);
  return double(sum_of<T>(total));
}

// A sum of many doubles, 16 at a time, or it would itself lose what each of them adds.
struct Total {
  double sum = 0, part = 0;
  int parts = 0;
  void operator+=(double x) {
    part += x;
    if (++parts % 16 == 0) sum += part, part = 0;
  }
  operator double() const { return sum + part; }
};

// One that keeps what its additions round away, where the sum is small beside the largest of its terms.
struct ExactTotal {
  double sum = 0, lost = 0;
  void operator+=(double x) {
    const double before = sum;
    sum += x;
    const double added = sum - before;
    lost += (before - (sum - added)) + (x - added);
  }
  operator double() const {
    const double whole = sum + lost;
    return whole - whole == 0 ? whole : sum;  // of an infinite sum nothing is lost, and `lost` is NaN
  }
};
