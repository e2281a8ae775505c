// BatchGrad over many rows: tiles of classes and features that stay in the first-level cache, shared by a few rows.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "run.h"

namespace fastood {

constexpr int GROUP = 16;             // classes of a tile
constexpr int64_t TILE = 1024;        // features of a tile
constexpr int64_t SHARE = 8 * GROUP;  // classes of a task: few rows are split over threads by classes

struct Row {
  double f_max, total, rest;  // of the softmax: p_max = 1 / total, 1 - p_max = rest / total
};

struct Work {
  const BatchGrad& b;
  int64_t rows_abreast, shares;
  std::vector<Row> rows;        // [rows]
  std::vector<double> partial;  // [shares, rows]
};

static void softmax_task(int64_t begin, int64_t end, void* context) {
  Work& work = *static_cast<Work*>(context);
  Call call{work.b.plan};
  call.logits = work.b.logits;
  for (int64_t row = begin; row < end; row++) {
    const LogitsState s = logits_row(call, row, nullptr, nullptr);
    const bool good = !s.nan && std::isfinite(s.f_max);
    work.rows[row] = {s.f_max, good ? s.ties + s.e_below : NAN, rest(s)};
  }
}

// One row's classes of a group that are worth the work.
template <class T> struct Active {
  int count, classes[GROUP];
  T turn[GROUP], pull[GROUP];
};

template <class T> static void tile_task(int64_t begin, int64_t end, void* context) {
  Work& work = *static_cast<Work*>(context);
  const BatchGrad& b = work.b;
  const T* G = static_cast<const T*>(b.G);
  const double T_ = b.plan.logits.temperature, tolerance = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;
  const int64_t tiles = (b.rows + work.rows_abreast - 1) / work.rows_abreast;
  std::unique_ptr<T[]> h(new T[work.rows_abreast * b.columns]()), e(new T[GROUP + 16]);
  std::vector<Active<T>> active(work.rows_abreast);
  std::vector<double> worth(work.rows_abreast);
  for (int64_t task = begin; task < end; task++) {
    const int64_t first = task % tiles * work.rows_abreast, count = std::min(work.rows_abreast, b.rows - first);
    const int64_t class_begin = task / tiles * SHARE, class_end = std::min(class_begin + SHARE, b.logits.columns);
    double* partial = &work.partial[task / tiles * b.rows + first];
    for (int64_t i = 0; i < count; i++) {
      T* to = &h[i * b.columns];
      double l1 = kernels->widen[b.feats.type](b.feats.at(first + i, 0), b.feats.columns, to);
      if (b.bias) to[b.feats.columns] = 1, l1 += 1;
      // A class adds at most 2 p ||h||_1 / T to its ||G_c||_1. All that are left out add less than `tolerance` to all
      // of ||G||_1, which the score is never below.
      worth[i] = tolerance * b.norm * T_ / (2 * l1 * b.logits.columns);
      partial[i] = l1 < INFINITY ? 0 : NAN;
    }
    for (int64_t c = class_begin; c < class_end; c += GROUP) {
      const int64_t n = std::min<int64_t>(GROUP, class_end - c);
      for (int64_t i = 0; i < count; i++) {
        const Row& row = work.rows[first + i];
        if (!(row.total < INFINITY) || !(partial[i] < INFINITY)) {
          partial[i] = NAN;
          active[i].count = 0;
          continue;
        }
        kernels->exponentials[b.logits.type](b.logits.at(first + i, c), n, b.plan.logits, row.f_max, e.get());
        Active<T>& a = active[i];
        a.count = 0;
        for (int64_t k = 0; k < n; k++) {
          const double p = double(e[k]) / row.total, one_minus_p = e[k] == 1 ? row.rest / row.total : 1 - p;
          if (p <= worth[i]) {
            partial[i] += b.norms[c + k];
            continue;
          }
          a.classes[a.count] = int(k);
          a.turn[a.count] = T(2 * p - 1);
          a.pull[a.count++] = T(2 * p * one_minus_p / T_);
        }
      }
      for (int64_t d = 0; d < b.columns; d += TILE)
        for (int64_t i = 0; i < count; i++)
          partial[i] += kernels->batchgrad[sizeof(T) == 8](&h[i * b.columns + d], std::min(TILE, b.columns - d),
                                                           G + c * b.columns + d, b.columns, active[i].classes,
                                                           active[i].turn, active[i].pull, active[i].count);
    }
  }
}

bool run(const BatchGrad& b) {
  const int64_t size = b.feats.type == FLOAT64 ? 8 : 4;
  Work work{b, std::clamp<int64_t>((256 << 10) / std::max<int64_t>(1, b.columns * size), 4, 32),
            (b.logits.columns + SHARE - 1) / SHARE, std::vector<Row>(b.rows), {}};
  work.partial.resize(work.shares * b.rows);
  share(b.rows, std::max<int64_t>(1, 32768 / b.logits.columns), softmax_task, &work);
  const int64_t tiles = (b.rows + work.rows_abreast - 1) / work.rows_abreast;
  share(tiles * work.shares, 1, size == 8 ? tile_task<double> : tile_task<float>, &work);
  bool finite = true;
  for (int64_t row = 0; row < b.rows; row++) {
    b.out[row] = 0;
    for (int64_t s = 0; s < work.shares; s++) b.out[row] += work.partial[s * b.rows + row];
    finite = finite && std::isfinite(b.out[row]);
  }
  return finite;
}

}  // namespace fastood
