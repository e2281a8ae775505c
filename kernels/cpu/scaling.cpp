// SCALE and its kin over many rows: features to a factor, logits scaled by it, and their energy as of any logits.
#include <algorithm>
#include <cmath>
#include <memory>

#include "run.h"

namespace fastood {

// One thread's rows, from `first` on.
struct Scaled {
  const Scaling& s;
  int64_t first;
  std::unique_ptr<double[]> features, logits;
  Guess guess;

  int64_t size() const { return s.logits.type == FLOAT64 ? 8 : 4; }

  void write(int64_t row, void* to) {
    double all, largest;
    kernels->top_sums[s.feats.type](s.feats.at(row, 0), s.feats.columns, s.k, s.relu, features.get(), &guess, &all, &largest);
    const double ratio = all == 0 && largest == 0 ? 1 : all / largest, r = s.square ? ratio * ratio : std::exp(ratio);
    const double max = kernels->scaled[s.logits.type](s.logits.at(row, 0), s.logits.columns, r, s.bias, to);
    if (std::isfinite(max) && std::isfinite(all) && std::isfinite(largest)) return;
    // A row without a softmax has no score; one whose sums are beyond the type is left to the definition.
    if (size() == 8) *static_cast<double*>(to) = NAN;
    else *static_cast<float*>(to) = NAN;
  }
};

static void write_row(void* context, int64_t row) {
  Scaled& scaled = *static_cast<Scaled*>(context);
  scaled.write(scaled.first + row, scaled.logits.get());
}

static void scaling_task(int64_t begin, int64_t end, void* context) {
  const Scaling& s = *static_cast<const Scaling*>(context);
  const int64_t C = s.logits.columns;
  constexpr int64_t some = 64;  // rows of few classes are read together
  Scaled scaled{s, begin, std::unique_ptr<double[]>(new double[s.feats.columns]),
                std::unique_ptr<double[]>(new double[C <= FEW ? some * C : C]), {}};
  char* room = reinterpret_cast<char*>(scaled.logits.get());
  Call call{s.energy};
  call.out_double = s.logits.type == FLOAT64;
  call.row_stride = 1;
  for (int64_t first = begin; first < end; first += call.rows) {
    call.rows = C <= FEW ? std::min(some, end - first) : end - first;
    call.out = static_cast<char*>(s.out) + first * scaled.size();
    call.logits = {room, call.out_double ? FLOAT64 : FLOAT32, C, C <= FEW ? C : 0};
    if (C > FEW) call.write = write_row, call.context = &scaled;
    for (int64_t i = 0; i < call.rows && C <= FEW; i++) scaled.write(first + i, room + i * C * scaled.size());
    run_here(call);
  }
}

template <class T> static bool finite(const void* out, int64_t rows) {
  const T* scores = static_cast<const T*>(out);
  return std::all_of(scores, scores + rows, [](T x) { return std::isfinite(x); });
}

bool run(const Scaling& s) {
  const int64_t width = s.logits.columns + s.feats.columns;
  share(s.rows, std::max<int64_t>(1, 32768 / width), scaling_task, const_cast<Scaling*>(&s));
  return s.logits.type == FLOAT64 ? finite<double>(s.out, s.rows) : finite<float>(s.out, s.rows);
}

}  // namespace fastood
