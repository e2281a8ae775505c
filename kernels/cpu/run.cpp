// Rows shared out over torch's threads, reduced by the kernels, and finished batch by batch.
#include "run.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <memory>

namespace fastood {

ParallelFor parallel_for = nullptr;

// Rows are finished together: a logarithm or a root of 16 numbers costs little more than that of one.
constexpr int64_t BATCH = 16;

struct Batch {
  LogitsState logits[BATCH];
  double swept[BATCH];
  NormsState norms[BATCH];
};

static int64_t chunks(int64_t columns) { return std::max<int64_t>(1, (columns + CHUNK - 1) / CHUNK); }

// What a row's chunks come to: neighbours are added first, and then pairs of them, for one after the other the rounding
// errors of equal terms would add up. read(chunk, &state) gives one's state, add(&a, b) adds b to a.
template <class State, class Read, class Add>
static void add_chunks(int64_t count, State* out, Read read, Add add) {
  if (count == 1) return read(0, out);
  std::vector<State> pending;  // of 2^k chunks for each bit k of how many are read, the largest first
  for (int64_t chunk = 0; chunk < count; chunk++) {
    pending.emplace_back();
    read(chunk, &pending.back());
    for (int64_t bits = chunk; pending.size() > 1 && (bits % 2 == 1 || chunk == count - 1); bits /= 2) {
      add(&pending[pending.size() - 2], pending.back());
      pending.pop_back();
    }
  }
  *out = pending.front();
}

static void add_double(double* a, double b) { *a += b; }

static void logits_chunk(const Call& call, int64_t row, int64_t chunk, void* kept, LogitsState* s) {
  const int64_t start = chunk * CHUNK;
  s->ties = s->e_below = s->squares_below = s->rest_z = s->differences = 0;
  for (int r = 0; r < call.plan.logits.power_sums; r++) s->powers_below[r] = 0;
  s->n = std::min(CHUNK, call.logits.columns - start);
  const void* next = start + s->n < call.logits.columns ? call.logits.at(row, start + s->n) : call.logits.at(row + 1, 0);
  kernels->logits[call.logits.type](call.logits.at(row, start), s->n, call.plan.logits, next, s, kept);
}

static double tv_chunk(const Call& call, int64_t row, int64_t chunk, const LogitsState& s, const void* kept) {
  const int64_t start = chunk * CHUNK, n = std::min(CHUNK, call.logits.columns - start);
  return kernels->tv[call.logits.type](call.logits.at(row, start), n, call.plan.logits, s.f_max, s.ties + s.e_below,
                                    1.0 / double(call.logits.columns), kept);
}

static GradientState gradient_chunk(const Call& call, int64_t row, int64_t chunk, const GradientRow& about,
                                    const void* kept) {
  const int64_t start = chunk * CHUNK, n = std::min(CHUNK, call.logits.columns - start);
  const void* labels = call.labels.data ? call.labels.at(row, start) : nullptr;
  const auto swept = [&](const GradientRow& about) {
    GradientState state{};
    clear(call.gradient_norms(), &state.difference);
    kernels->gradient[call.logits.type](call.logits.at(row, start), n, kept, labels, call.labels.type, call.plan.logits,
                                        call.plan.gradient, call.gradient_norms(), about, &state);
    return state;
  };
  GradientState state = swept(about);
  if (call.plan.gradient.labels == LOG_PREDICTED && state.sum_below == -INFINITY) {  // beyond float, or a masked class
    GradientRow larger = about;
    larger.log_unit = std::min(1.0, std::ldexp(1.0, -16 - std::ilogb(call.plan.logits.scale)));
    state = swept(larger);
    state.sum_below /= larger.log_unit;
  }
  return state;
}

template <class Read> static void add_gradients(const Call& call, int64_t count, GradientState* out, Read read) {
  add_chunks(count, out, read, [&](GradientState* a, const GradientState& b) { merge(call, a, b); });
}

static double gradient_of(const Call& call, int64_t row, const LogitsState& s, const void* kept) {
  const GradientRow about = gradient_row(call, s);
  GradientState state;
  add_gradients(call, chunks(call.logits.columns), &state, [&](int64_t c, GradientState* out) {
    *out = gradient_chunk(call, row, c, about, c ? nullptr : kept);
  });
  return gradient(call, row, s, about, state);
}

static bool has_softmax(const LogitsState& s) { return !s.nan && std::isfinite(s.f_max); }

static void norms_chunk(const Call& call, int64_t row, int64_t chunk, NormsState* s) {
  clear(call.norms_plan(), s);
  const int64_t start = chunk * CHUNK, n = std::min(CHUNK, call.feats.columns - start);
  const void* next = start + n < call.feats.columns ? call.feats.at(row, start + n) : call.feats.at(row + 1, 0);
  if (n > 0) kernels->norms[call.feats.type](call.feats.at(row, start), n, call.norms_plan(), next, s);
}

template <class Read> static void add_logits(const Call& call, int64_t count, LogitsState* out, Read read) {
  add_chunks(count, out, read, [&](LogitsState* a, const LogitsState& b) { merge(call.plan.logits, a, b); });
}

template <class Read> static void add_norms(const Call& call, int64_t count, NormsState* out, Read read) {
  add_chunks(count, out, read, [&](NormsState* a, const NormsState& b) { merge(call.norms_plan(), a, b); });
}

LogitsState logits_row(const Call& call, int64_t row, double* kept, double* swept) {
  const int64_t count = chunks(call.logits.columns);
  LogitsState s;
  add_logits(call, count, &s, [&](int64_t c, LogitsState* out) { logits_chunk(call, row, c, c ? nullptr : kept, out); });
  if (swept) *swept = 0;
  if (!has_softmax(s)) return s;
  if (call.plan.logits.sums & TV)
    add_chunks(count, swept, [&](int64_t c, double* out) { *out = tv_chunk(call, row, c, s, kept); }, add_double);
  if (call.plan.gradient.wanted) *swept = gradient_of(call, row, s, kept);
  return s;
}

static void norms_row(const Call& call, int64_t row, NormsState* s) {
  add_norms(call, chunks(call.feats.columns), s, [&](int64_t c, NormsState* out) { norms_chunk(call, row, c, out); });
}

static void few_logits(const Call& call, int64_t row, int64_t count, Batch* batch) {
  kernels->few_logits[call.logits.type](call.logits.at(row, 0), call.logits.stride, count, call.logits.columns,
                                        call.plan.logits, batch->logits, batch->swept);
  for (int64_t i = 0; i < count && call.plan.gradient.wanted; i++)
    if (has_softmax(batch->logits[i])) batch->swept[i] = gradient_of(call, row + i, batch->logits[i], nullptr);
}

// KL(u || p) or TV of nearly flat rows, read again.
//
// With x_k = (f_k - level) / T - shift, where the level is that of p = 1/C, and shift what its type rounds away,
// p_k - 1/C = expm1(x_k) / C and KL(u || p) = mean(e^x_k - 1 - x_k), in which nothing cancels. The level comes from the
// row's sums, with their error. At the right level mean expm1(x) is 0: what it is instead corrects the level, in passes,
// until it is small beside what is asked for: the first leaves 2^-52 of its size, each of the next a rounding error of that.
static void flat_again(const Call& call, Stat stat, int64_t row, int64_t count, const LogitsState* s, const double* log1p,
                         double* out) {
  const double C = double(call.logits.columns), T = call.plan.logits.temperature;
  bool flat[BATCH], any = false;
  for (int64_t i = 0; i < count; i++)
    any |= flat[i] = nearly_flat(stat, out[i], call.plan.logits, s[i], call.logits.columns);
  if (!any) return;
  const bool wide = call.logits.type == FLOAT64, few = call.logits.columns <= FEW;
  const double log_C = std::log(C);
  double level[BATCH], shift[BATCH];
  LevelSums sums[BATCH];
  for (int64_t i = 0; i < count; i++) {
    level[i] = s[i].f_max, shift[i] = log1p[i] - log_C;
    if (flat[i] && s[i].ties == C) out[i] = 0, flat[i] = false;
  }
  for (int pass = 0; pass < (wide ? 24 : 8) && any; pass++) {
    for (int64_t i = 0; i < count; i++) {
      if (!flat[i]) continue;
      const double next = wide ? level[i] + T * shift[i] : float(level[i] + T * shift[i]);
      shift[i] -= (next - level[i]) / T;
      level[i] = next;
      if (!few)
        kernels->level[call.logits.type](call.logits.at(row + i, 0), 0, 1, call.logits.columns, T, level + i, shift + i,
                                         sums + i);
    }
    if (few)
      kernels->few_level[call.logits.type](call.logits.at(row, 0), call.logits.stride, count, call.logits.columns, T, level,
                                           shift, sums);
    any = false;
    for (int64_t i = 0; i < count; i++) {
      if (!flat[i]) continue;
      const double off = sums[i].expm1 / C;
      out[i] = (stat == Stat::kl_uniform ? sums[i].tail : sums[i].above) / C;
      flat[i] = !((stat == Stat::kl_uniform ? off * off : std::fabs(off) / 16) <= (wide ? 0x1p-53 : 0x1p-24) * out[i]);
      any |= flat[i];
      if (flat[i]) shift[i] += std::log1p(off);
    }
  }
}

// The j-th statistic of some rows: from their sums, or from the rows themselves, read again, where those do not tell.
static void statistics_of(const Call& call, size_t j, int64_t row, int64_t count, const Batch& batch, const double* log1p,
                          double* out) {
  const Stat stat = call.plan.stats[j];
  const int type = call.logits.type;
  const int64_t C = call.logits.columns;
  statistics(stat, call.plan.power_of_stat[j], call.plan.logits, batch.logits, count, C, batch.swept, log1p, out);
  if (stat == Stat::kl_uniform || stat == Stat::tv) return flat_again(call, stat, row, count, batch.logits, log1p, out);
  if (stat != Stat::gen && !ABOUT[int(stat)].is_log) return;
  for (int64_t i = 0; i < count; i++) {
    const LogitsState& s = batch.logits[i];
    const void* f = call.logits.at(row + i, 0);
    const double r1 = rest(s);
    if (!has_softmax(s)) continue;
    if (stat == Stat::gen)
      out[i] = kernels->gen[type](f, C, call.plan.logits, s.f_max, 1 + r1, r1, call.plan.gamma[j], call.plan.M[j]);
    else if (r1 < 0x1p-900)
      out[i] = statistic_of_rest(stat, call.plan.logits, s, kernels->log2_rest[type](f, C, call.plan.logits, s.f_max));
  }
}

// v (norm / divisor)^power, one by one, in an order in which nothing overflows before the score does: 0 stays 0. The
// largest double stands for norms beyond it. What comes out next to 0 is formed again from a larger v, for a product on
// the way may have vanished.
static double times(double v, double norm, const Column& c) {
  const auto product = [&](double x) {
    for (int i = 0; i < c.power; i++) x = c.divisor < 1 ? x * norm / c.divisor : x * (norm / c.divisor);
    return x;
  };
  const double score = product(v);
  if (std::fabs(score) < 0x1p-900 && std::fabs(v) < 0x1p400) return product(v * 0x1p600) * 0x1p-600;
  return norm == DBL_MAX ? score * DBL_MAX : score;
}

static void finish(const Call& call, int64_t row, int64_t count, Batch* batch) {
  double stats[MAX_STATS][BATCH], norms[MAX_ORDERS][BATCH], log1p[BATCH] = {};
  if (!call.plan.stats.empty()) {
    for (int64_t i = 0; i < count; i++) log1p[i] = rest(batch->logits[i]);
    kernels->log1p(log1p, BATCH);
  }
  for (size_t j = 0; j < call.plan.stats.size(); j++) statistics_of(call, j, row, count, *batch, log1p, stats[j]);

  if (call.plan.bias && !call.orders().empty()) {
    const double one = 1;
    NormsState last;
    clear(call.norms_plan(), &last);
    kernels->norms[FLOAT64](&one, 1, call.norms_plan(), &one, &last);
    for (int64_t i = 0; i < count; i++) merge(call.norms_plan(), &batch->norms[i], last);
  }
  for (size_t j = 0; j < call.orders().size(); j++) {
    const Order& order = call.orders()[j];
    if (call.plan.log) {
      for (int64_t i = 0; i < count; i++) norms[j][i] = log_norm(order, call.norms_plan(), batch->norms[i]);
      continue;
    }
    double root[BATCH] = {};
    for (int64_t i = 0; i < count; i++) root[i] = sum_of_powers(order, batch->norms[i]);
    if (order.r == 2)
      for (double& x : root) x = std::sqrt(x);
    else if (call.feats.type == FLOAT64)  // which the vectors are not precise enough for
      for (double& x : root) x = std::pow(x, 1 / order.r);
    else if (order.r != 1 && order.slot >= 0)
      kernels->power(root, BATCH, 1 / order.r);
    norms_from_roots(order, call.norms_plan(), batch->norms, count, root, norms[j]);
  }

  const auto store = [&](size_t column, const double* x) {
    const int64_t first = row * call.row_stride + int64_t(column) * call.column_stride;
    for (int64_t i = 0; i < count; i++) {
      if (call.out_double) static_cast<double*>(call.out)[first + i * call.row_stride] = x[i];
      else static_cast<float*>(call.out)[first + i * call.row_stride] = float(x[i]);
    }
  };
  if (call.plan.columns.empty()) {
    for (size_t j = 0; j < call.plan.stats.size(); j++) store(j, stats[j]);
    for (size_t j = 0; j < call.orders().size(); j++) store(call.plan.stats.size() + j, norms[j]);
  }
  for (size_t k = 0; k < call.plan.columns.size(); k++) {
    const Column& c = call.plan.columns[k];
    double score[BATCH];
    const auto value = [&](const Term& t, int64_t i) { return t.stat < 0 ? t.coefficient : t.coefficient * stats[t.stat][i]; };
    for (int64_t i = 0; i < count; i++) score[i] = value(c.terms[0], i);
    for (size_t n = 1; n < c.terms.size(); n++)
      for (int64_t i = 0; i < count; i++) score[i] += value(c.terms[n], i);
    if (c.order >= 0 && c.divisor == 1 && c.power == 1 && !call.out_double) {
      for (int64_t i = 0; i < count; i++) score[i] *= norms[c.order][i];  // times the largest double is beyond float too
    } else if (c.order >= 0) {
      for (int64_t i = 0; i < count; i++) score[i] = times(score[i], norms[c.order][i], c);
    }
    store(k, score);
  }
}

// ---- many rows: each thread takes whole rows

static void rows_task(int64_t begin, int64_t end, void* context) {
  const Call& call = *static_cast<const Call*>(context);
  std::unique_ptr<double[]> kept;
  // With a vector's width to spare, for the padding.
  const bool read_twice = (call.plan.logits.sums & TV) || call.plan.gradient.wanted;
  if (read_twice && call.logits.columns > FEW && call.logits.columns <= CHUNK)
    kept.reset(new double[call.logits.columns + 16]);
  Batch batch;
  for (int64_t row = begin; row < end; row += BATCH) {
    const int64_t count = std::min(BATCH, end - row);
    if (!call.plan.stats.empty()) {
      if (call.logits.columns <= FEW) few_logits(call, row, count, &batch);
      else
        for (int64_t i = 0; i < count; i++) {
          if (call.write) call.write(call.context, row + i);
          batch.logits[i] = logits_row(call, row + i, kept.get(), &batch.swept[i]);
        }
    }
    if (!call.orders().empty())
      for (int64_t i = 0; i < count; i++) norms_row(call, row + i, &batch.norms[i]);
    finish(call, row, count, &batch);
  }
}

// ---- few long rows: each thread takes chunks, merged in the same order as above

struct Split {
  const Call& call;
  int64_t logit_chunks, feat_chunks;
  std::vector<LogitsState> logits;  // [rows, logit_chunks]
  std::vector<NormsState> norms;    // [rows, feat_chunks]
  std::vector<LogitsState> merged;  // [rows]
  std::vector<double> tv;           // [rows, logit_chunks], where it is wanted
  std::vector<GradientState> gradient;
};

static void sums_task(int64_t begin, int64_t end, void* context) {
  Split& split = *static_cast<Split*>(context);
  const int64_t first_norm = split.logits.size();
  for (int64_t i = begin; i < end; i++) {
    if (i < first_norm) {
      logits_chunk(split.call, i / split.logit_chunks, i % split.logit_chunks, nullptr, &split.logits[i]);
    } else {
      const int64_t j = i - first_norm;
      norms_chunk(split.call, j / split.feat_chunks, j % split.feat_chunks, &split.norms[j]);
    }
  }
}

static void second_task(int64_t begin, int64_t end, void* context) {
  Split& split = *static_cast<Split*>(context);
  for (int64_t i = begin; i < end; i++) {
    const int64_t row = i / split.logit_chunks, chunk = i % split.logit_chunks;
    const LogitsState& s = split.merged[row];
    if (!has_softmax(s)) continue;
    if (!split.tv.empty()) split.tv[i] = tv_chunk(split.call, row, chunk, s, nullptr);
    if (!split.gradient.empty())
      split.gradient[i] = gradient_chunk(split.call, row, chunk, gradient_row(split.call, s), nullptr);
  }
}

void share(int64_t tasks, int64_t grain, void (*task)(int64_t, int64_t, void*), void* context) {
  if (!(parallel_for && tasks > grain && parallel_for(0, tasks, grain, task, context) == 0)) task(0, tasks, context);
}

static void run_split(const Call& call) {
  Batch batch;
  const bool many = !call.plan.stats.empty() && call.logits.columns > FEW;
  Split split{call, many ? chunks(call.logits.columns) : 0, call.orders().empty() ? 0 : chunks(call.feats.columns),
              {}, {}, {}, {}, {}};
  split.logits.resize(call.rows * split.logit_chunks);
  split.norms.resize(call.rows * split.feat_chunks);
  share(split.logits.size() + split.norms.size(), 1, sums_task, &split);
  for (int64_t row = 0; row < call.rows && split.logit_chunks; row++) {
    split.merged.emplace_back();
    add_logits(call, split.logit_chunks, &split.merged.back(),
               [&](int64_t c, LogitsState* out) { *out = split.logits[row * split.logit_chunks + c]; });
  }
  if (call.plan.logits.sums & TV) split.tv.resize(split.logits.size());
  if (call.plan.gradient.wanted) split.gradient.resize(split.logits.size());
  share(std::max(split.tv.size(), split.gradient.size()), 1, second_task, &split);
  if (!call.plan.stats.empty() && !many) few_logits(call, 0, call.rows, &batch);
  for (int64_t row = 0; row < call.rows; row++) {
    if (many) {
      batch.logits[row] = split.merged[row];
      batch.swept[row] = 0;
      const int64_t first = row * split.logit_chunks;
      if (!split.tv.empty())
        add_chunks(split.logit_chunks, &batch.swept[row], [&](int64_t c, double* out) { *out = split.tv[first + c]; },
                   add_double);
      if (!split.gradient.empty() && has_softmax(split.merged[row])) {
        GradientState state;
        add_gradients(call, split.logit_chunks, &state,
                      [&](int64_t c, GradientState* out) { *out = split.gradient[first + c]; });
        batch.swept[row] = gradient(call, row, split.merged[row], gradient_row(call, split.merged[row]), state);
      }
    }
    NormsState h;
    clear(call.norms_plan(), &h);
    if (split.feat_chunks)
      add_norms(call, split.feat_chunks, &h,
                [&](int64_t c, NormsState* out) { *out = split.norms[row * split.feat_chunks + c]; });
    batch.norms[row] = h;
  }
  finish(call, 0, call.rows, &batch);
}

void run_here(const Call& call) { rows_task(0, call.rows, const_cast<Call*>(&call)); }

void run(const Call& call) {
  constexpr int64_t worth_a_thread = 32768;  // elements; torch's own grain
  const int64_t width = (call.plan.stats.empty() ? 0 : call.logits.columns) +
                        (call.orders().empty() ? 0 : call.feats.columns);
  if (call.rows < 8 && width > 2 * worth_a_thread)
    run_split(call);
  else
    share(call.rows, std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, width)), rows_task,
          const_cast<Call*>(&call));
}

}  // namespace fastood
