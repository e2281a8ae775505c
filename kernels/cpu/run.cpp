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

static int64_t chunks(int64_t columns) { return (columns + CHUNK - 1) / CHUNK; }

static void logits_chunk(const Request& q, int64_t row, int64_t chunk, void* kept, LogitsState* s) {
  const int64_t start = chunk * CHUNK;
  s->ties = s->exp = s->squares = s->exp_z = s->below = 0;
  for (int r = 0; r < q.plan.logits.power_sums; r++) s->powers[r] = 0;
  s->n = std::min(CHUNK, q.logits.columns - start);
  const void* next = start + s->n < q.logits.columns ? q.logits.at(row, start + s->n) : q.logits.at(row + 1, 0);
  kernels->logits[q.logits.type](q.logits.at(row, start), s->n, q.plan.logits, next, s, kept);
}

static double tv_chunk(const Request& q, int64_t row, int64_t chunk, const LogitsState& s, const void* kept) {
  const int64_t start = chunk * CHUNK, n = std::min(CHUNK, q.logits.columns - start);
  return kernels->tv[q.logits.type](q.logits.at(row, start), n, q.plan.logits, s.max, s.ties + s.exp,
                                    1.0 / double(q.logits.columns), kept);
}

static GradientState gradient_chunk(const Request& q, int64_t row, int64_t chunk, const GradientRow& about, const void* kept) {
  GradientState state{};
  clear(q.gradient_norms(), &state.difference);
  const int64_t start = chunk * CHUNK, n = std::min(CHUNK, q.logits.columns - start);
  const void* labels = q.labels.data ? q.labels.at(row, start) : nullptr;
  kernels->gradient[q.logits.type](q.logits.at(row, start), n, kept, labels, q.labels.type, q.plan.logits, q.plan.gradient,
                                   q.gradient_norms(), about, &state);
  return state;
}

static double gradient_of(const Request& q, int64_t row, const LogitsState& s, const void* kept) {
  const GradientRow about = gradient_row(q, s);
  GradientState state = gradient_chunk(q, row, 0, about, kept);
  for (int64_t c = 1; c < chunks(q.logits.columns); c++) merge(q, &state, gradient_chunk(q, row, c, about, nullptr));
  return gradient(q, row, s, about, state);
}

static bool has_softmax(const LogitsState& s) { return !s.nan && std::isfinite(s.max); }

static void norms_chunk(const Request& q, int64_t row, int64_t chunk, NormsState* s) {
  clear(q.norms_plan(), s);
  const int64_t start = chunk * CHUNK, n = std::min(CHUNK, q.feats.columns - start);
  const void* next = start + n < q.feats.columns ? q.feats.at(row, start + n) : q.feats.at(row + 1, 0);
  if (n > 0) kernels->norms[q.feats.type](q.feats.at(row, start), n, q.norms_plan(), next, s);
}

LogitsState logits_row(const Request& q, int64_t row, double* kept, double* swept) {
  const int64_t count = chunks(q.logits.columns);
  LogitsState s, next;
  logits_chunk(q, row, 0, kept, &s);
  for (int64_t c = 1; c < count; c++) {
    logits_chunk(q, row, c, nullptr, &next);
    merge(q.plan.logits, &s, next);
  }
  if (swept) *swept = 0;
  if (!has_softmax(s)) return s;
  if (q.plan.logits.sums & TV)
    for (int64_t c = 0; c < count; c++) *swept += tv_chunk(q, row, c, s, kept);
  if (q.plan.gradient.wanted) *swept = gradient_of(q, row, s, kept);
  return s;
}

static void norms_row(const Request& q, int64_t row, NormsState* s) {
  NormsState next;
  norms_chunk(q, row, 0, s);
  for (int64_t c = 1; c < chunks(q.feats.columns); c++) {
    norms_chunk(q, row, c, &next);
    merge(q.norms_plan(), s, next);
  }
}

static void few_logits(const Request& q, int64_t row, int64_t count, Batch* batch) {
  kernels->few_logits[q.logits.type](q.logits.at(row, 0), q.logits.stride, count, q.logits.columns, q.plan.logits,
                                     batch->logits, batch->swept);
  for (int64_t i = 0; i < count && q.plan.gradient.wanted; i++)
    if (has_softmax(batch->logits[i])) batch->swept[i] = gradient_of(q, row + i, batch->logits[i], nullptr);
}

// KL(u || p) or TV of nearly flat rows, read again.
//
// With x_k = (f_k - level) / T - shift, where the level is that of p = 1/C, and shift what its type rounds away,
// p_k - 1/C = expm1(x_k) / C and KL(u || p) = mean(e^x_k - 1 - x_k), in which nothing cancels. What a row's sums tell of
// the level is off by as much as they are; mean expm1(x) tells by how much, until it is small beside what is asked for.
static void of_flat_rows(const Request& q, Stat stat, int64_t row, int64_t count, const LogitsState* s, const double* log1p,
                         double* out) {
  const double C = double(q.logits.columns), T = q.plan.logits.temperature;
  bool flat[BATCH], any = false;
  for (int64_t i = 0; i < count; i++) any |= flat[i] = nearly_flat(stat, out[i], q.plan.logits, s[i], q.logits.columns);
  if (!any) return;
  const bool wide = q.logits.type == FLOAT64, few = q.logits.columns <= FEW;
  const double log_C = std::log(C);
  double level[BATCH], shift[BATCH];
  LevelSums sums[BATCH];
  for (int64_t i = 0; i < count; i++) {
    level[i] = s[i].max, shift[i] = log1p[i] - log_C;
    if (flat[i] && s[i].ties == C) out[i] = 0, flat[i] = false;
  }
  for (int turn = 0; turn < 4 && any; turn++) {
    for (int64_t i = 0; i < count; i++) {
      if (!flat[i]) continue;
      const double next = wide ? level[i] + T * shift[i] : float(level[i] + T * shift[i]);
      shift[i] -= (next - level[i]) / T;
      level[i] = next;
      if (!few)
        kernels->level[q.logits.type](q.logits.at(row + i, 0), 0, 1, q.logits.columns, T, level + i, shift + i, sums + i);
    }
    if (few)
      kernels->few_level[q.logits.type](q.logits.at(row, 0), q.logits.stride, count, q.logits.columns, T, level, shift, sums);
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
static void statistics_of(const Request& q, size_t j, int64_t row, int64_t count, const Batch& batch, const double* log1p,
                          double* out) {
  const Stat stat = q.plan.stats[j];
  const int type = q.logits.type;
  const int64_t C = q.logits.columns;
  statistics(stat, q.plan.power_of_stat[j], q.plan.logits, batch.logits, count, C, batch.swept, log1p, out);
  if (stat == Stat::kl_uniform || stat == Stat::tv) return of_flat_rows(q, stat, row, count, batch.logits, log1p, out);
  if (stat != Stat::gen && !ABOUT[int(stat)].is_log) return;
  for (int64_t i = 0; i < count; i++) {
    const LogitsState& s = batch.logits[i];
    const void* f = q.logits.at(row + i, 0);
    const double r1 = rest(s);
    if (!has_softmax(s)) continue;
    if (stat == Stat::gen)
      out[i] = kernels->gen[type](f, C, q.plan.logits, s.max, 1 + r1, r1, q.plan.gamma[j], q.plan.M[j]);
    else if (r1 < 0x1p-900)
      out[i] = statistic_of_rest(stat, q.plan.logits, s, kernels->log2_rest[type](f, C, q.plan.logits, s.max));
  }
}

// v (norm / divisor)^power, one by one, in an order in which nothing overflows before the score does: 0 stays 0. The
// largest double stands for norms beyond it.
static double times(double v, double norm, const Column& c) {
  for (int i = 0; i < c.power; i++) v = c.divisor < 1 ? v * norm / c.divisor : v * (norm / c.divisor);
  return norm == DBL_MAX ? v * DBL_MAX : v;
}

static void finish(const Request& q, int64_t row, int64_t count, Batch* batch) {
  double stats[MAX_STATS][BATCH], norms[MAX_ORDERS][BATCH], log1p[BATCH] = {};
  if (!q.plan.stats.empty()) {
    for (int64_t i = 0; i < count; i++) log1p[i] = rest(batch->logits[i]);
    kernels->log1p(log1p, BATCH);
  }
  for (size_t j = 0; j < q.plan.stats.size(); j++) statistics_of(q, j, row, count, *batch, log1p, stats[j]);

  if (q.plan.bias && !q.orders().empty()) {
    const double one = 1;
    NormsState last;
    clear(q.norms_plan(), &last);
    kernels->norms[FLOAT64](&one, 1, q.norms_plan(), &one, &last);
    for (int64_t i = 0; i < count; i++) merge(q.norms_plan(), &batch->norms[i], last);
  }
  for (size_t j = 0; j < q.orders().size(); j++) {
    const Order& order = q.orders()[j];
    if (q.plan.log) {
      for (int64_t i = 0; i < count; i++) norms[j][i] = log_norm(order, q.norms_plan(), batch->norms[i]);
      continue;
    }
    double root[BATCH] = {};
    for (int64_t i = 0; i < count; i++) root[i] = sum_of_powers(order, batch->norms[i]);
    if (order.r == 2)
      for (double& x : root) x = std::sqrt(x);
    else if (q.feats.type == FLOAT64)  // which the vectors are not precise enough for
      for (double& x : root) x = std::pow(x, 1 / order.r);
    else if (order.r != 1 && order.slot >= 0)
      kernels->power(root, BATCH, 1 / order.r);
    norms_from_roots(order, q.norms_plan(), batch->norms, count, root, norms[j]);
  }

  const auto store = [&](size_t column, const double* x) {
    const int64_t first = row * q.row_stride + int64_t(column) * q.column_stride;
    for (int64_t i = 0; i < count; i++) {
      if (q.out_double) static_cast<double*>(q.out)[first + i * q.row_stride] = x[i];
      else static_cast<float*>(q.out)[first + i * q.row_stride] = float(x[i]);
    }
  };
  if (q.plan.columns.empty()) {
    for (size_t j = 0; j < q.plan.stats.size(); j++) store(j, stats[j]);
    for (size_t j = 0; j < q.orders().size(); j++) store(q.plan.stats.size() + j, norms[j]);
  }
  for (size_t k = 0; k < q.plan.columns.size(); k++) {
    const Column& c = q.plan.columns[k];
    double score[BATCH] = {};
    for (const Term& t : c.terms)
      for (int64_t i = 0; i < count; i++) {
        const double x = t.stat < 0 ? t.coefficient : t.coefficient * stats[t.stat][i];
        score[i] = &t == &c.terms[0] ? x : score[i] + x;  // a sum from 0 on would lose the sign of -0
      }
    if (c.order >= 0 && c.divisor == 1 && c.power == 1 && !q.out_double) {
      for (int64_t i = 0; i < count; i++) score[i] *= norms[c.order][i];  // times the largest double is beyond float too
    } else if (c.order >= 0) {
      for (int64_t i = 0; i < count; i++) score[i] = times(score[i], norms[c.order][i], c);
    }
    store(k, score);
  }
}

// ---- many rows: each thread takes whole rows

static void rows_task(int64_t begin, int64_t end, void* context) {
  const Request& q = *static_cast<const Request*>(context);
  std::unique_ptr<double[]> kept;
  // With a vector's width to spare, for the padding.
  if (((q.plan.logits.sums & TV) || q.plan.gradient.wanted) && q.logits.columns > FEW && q.logits.columns <= CHUNK)
    kept.reset(new double[q.logits.columns + 16]);
  Batch batch;
  for (int64_t row = begin; row < end; row += BATCH) {
    const int64_t count = std::min(BATCH, end - row);
    if (!q.plan.stats.empty()) {
      if (q.logits.columns <= FEW) few_logits(q, row, count, &batch);
      else
        for (int64_t i = 0; i < count; i++) batch.logits[i] = logits_row(q, row + i, kept.get(), &batch.swept[i]);
    }
    if (!q.orders().empty())
      for (int64_t i = 0; i < count; i++) norms_row(q, row + i, &batch.norms[i]);
    finish(q, row, count, &batch);
  }
}

// ---- few long rows: each thread takes chunks, merged in the same order as above

struct Split {
  const Request& q;
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
    if (i < first_norm)
      logits_chunk(split.q, i / split.logit_chunks, i % split.logit_chunks, nullptr, &split.logits[i]);
    else
      norms_chunk(split.q, (i - first_norm) / split.feat_chunks, (i - first_norm) % split.feat_chunks, &split.norms[i - first_norm]);
  }
}

static void second_task(int64_t begin, int64_t end, void* context) {
  Split& split = *static_cast<Split*>(context);
  for (int64_t i = begin; i < end; i++) {
    const int64_t row = i / split.logit_chunks, chunk = i % split.logit_chunks;
    const LogitsState& s = split.merged[row];
    if (!has_softmax(s)) continue;
    if (!split.tv.empty()) split.tv[i] = tv_chunk(split.q, row, chunk, s, nullptr);
    if (!split.gradient.empty()) split.gradient[i] = gradient_chunk(split.q, row, chunk, gradient_row(split.q, s), nullptr);
  }
}

void share(int64_t tasks, int64_t grain, void (*task)(int64_t, int64_t, void*), void* context) {
  if (!(parallel_for && tasks > grain && parallel_for(0, tasks, grain, task, context) == 0)) task(0, tasks, context);
}

static void run_split(const Request& q) {
  Batch batch;
  const bool many = !q.plan.stats.empty() && q.logits.columns > FEW;
  Split split{q, many ? chunks(q.logits.columns) : 0, q.orders().empty() ? 0 : chunks(q.feats.columns), {}, {}, {}, {}, {}};
  split.logits.resize(q.rows * split.logit_chunks);
  split.norms.resize(q.rows * split.feat_chunks);
  share(split.logits.size() + split.norms.size(), 1, sums_task, &split);
  for (int64_t row = 0; row < q.rows && split.logit_chunks; row++) {
    LogitsState s = split.logits[row * split.logit_chunks];
    for (int64_t c = 1; c < split.logit_chunks; c++) merge(q.plan.logits, &s, split.logits[row * split.logit_chunks + c]);
    split.merged.push_back(s);
  }
  if (q.plan.logits.sums & TV) split.tv.resize(split.logits.size());
  if (q.plan.gradient.wanted) split.gradient.resize(split.logits.size());
  share(std::max(split.tv.size(), split.gradient.size()), 1, second_task, &split);
  if (!q.plan.stats.empty() && !many) few_logits(q, 0, q.rows, &batch);
  for (int64_t row = 0; row < q.rows; row++) {
    if (many) {
      batch.logits[row] = split.merged[row];
      batch.swept[row] = 0;
      for (size_t c = 0; c < split.tv.size() / q.rows; c++) batch.swept[row] += split.tv[row * split.logit_chunks + c];
      if (!split.gradient.empty() && has_softmax(split.merged[row])) {
        GradientState* state = &split.gradient[row * split.logit_chunks];
        for (int64_t c = 1; c < split.logit_chunks; c++) merge(q, state, state[c]);
        batch.swept[row] = gradient(q, row, split.merged[row], gradient_row(q, split.merged[row]), *state);
      }
    }
    NormsState h;
    clear(q.norms_plan(), &h);
    if (split.feat_chunks) h = split.norms[row * split.feat_chunks];
    for (int64_t c = 1; c < split.feat_chunks; c++) merge(q.norms_plan(), &h, split.norms[row * split.feat_chunks + c]);
    batch.norms[row] = h;
  }
  finish(q, 0, q.rows, &batch);
}

void run(const Request& q) {
  constexpr int64_t worth_a_thread = 32768;  // elements; torch's own grain
  const int64_t width = (q.plan.stats.empty() ? 0 : q.logits.columns) + (q.orders().empty() ? 0 : q.feats.columns);
  if (q.rows < 8 && width > 2 * worth_a_thread)
    run_split(q);
  else
    share(q.rows, std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, width)), rows_task, const_cast<Request*>(&q));
}

}  // namespace fastood
