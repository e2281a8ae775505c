// Elementary functions of whole arrays: of a batch's results, and for tests. Included by rows.h.

static void exp2_of(const float* x, float* out, int64_t n) {
  for_blocks<1, float>(
      x, n, 0.0f,
      [&](int, V<float> v, int64_t i, int64_t first) {
        V<float> y = exp2_sum<float, true>(v, V<float>{}, V<float>{} != V<float>{});
        for (int64_t k = first; k < Vec<float>::lanes; k++) out[i + k - first] = y[k];
      },
      [] {});
}

static void log2_of(const float* x, float* out, int64_t n) {
  for_blocks<1, float>(
      x, n, 1.0f,
      [&](int, V<float> v, int64_t i, int64_t first) {
        V<float> whole, part;
        log2_parts<float>(v, &whole, &part);
        for (int64_t k = first; k < Vec<float>::lanes; k++) out[i + k - first] = whole[k] + part[k];
      },
      [] {});
}

static void log1p_of(double* x, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec<double>::lanes) {
    // What rounding took from u counts where log u is small, and there 1 / u is near 2 - u.
    const V<double> v = load(x + i), u = v + 1.0, lost = u < 1.5 ? (v - (u - 1.0)) * (2.0 - u) : V<double>{};
    V<double> whole, part;
    log2_parts<double>(u, &whole, &part);
    const V<double> y = (whole + part) * 0.6931471805599453 + lost;
    __builtin_memcpy(x + i, &y, sizeof y);
  }
}

static void power_of(double* x, int64_t n, double exponent) {
  for (int64_t i = 0; i < n; i += Vec<double>::lanes) {
    const V<double> v = load(x + i);
    V<double> whole, part;
    log2_parts<double>(v, &whole, &part);
    const V<double> y = (whole + part) * exponent, held = y < 1023.5 ? y : all<double>(1023.5);
    V<double> power = exp2_sum<double, true>(held, V<double>{}, v == 0);
    power = y < 1024.0 ? power : all<double>(__builtin_inf());
    __builtin_memcpy(x + i, &power, sizeof power);
  }
}
