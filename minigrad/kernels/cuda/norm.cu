// Batch norm: every column of the pixel matrix on its own. Sums and a channel's numbers are in double: float loses
// digits over many pixels, and where the mean is large. Local response normalisation: every pixel on its own.

// Σ (x − shift) and Σ (x − shift)² over the rows. The channel's first value is the shift: what is left is of the size
// of the standard deviation, so that the variance is not a small difference of large squares.
KERNEL statistics_parts(Input x, Index ld, double* parts, Index rows, Index channels) {
  const Index c = COLUMN * V;
  double sums[2 * V]{};
  if (c < channels) {
    const Pack shift = pack(x + c);
    EACH_ROW(r, rows) {
      const Pack values = pack(x + r * ld + c);
      for (int e = 0; e < V; ++e) {
        const double d = (double)values.value[e] - shift.value[e];
        sums[e] += d;
        sums[V + e] += d * d;
      }
    }
  }
  leave(sums, parts, channels, c, channels);
}

// mean = shift + Σ (x − shift) / m,   var = Σ (x − shift)² / m − (mean − shift)²
KERNEL statistics(Numbers parts, Index count, Input x, double* mean, double* var, Index m, Index channels) {
  const Index c = COLUMN;
  const double rest = total(parts, count, 2, 0, channels, c) / m, square = total(parts, count, 2, 1, channels, c) / m;
  if (c < channels && threadIdx.y == 0) {
    const double value = square - rest * rest;
    mean[c] = x[c] + rest;
    var[c] = value < 0 ? 0 : value;  // by rounding alone
  }
}

// running ← (1 − momentum)·running + momentum·batch; the variance times `unbiased`, n / (n − 1)
KERNEL move_running(Output running_mean, Output running_var, Numbers mean, Numbers var, double unbiased,
                    double momentum, Index channels) {
  EACH_ROW(c, channels) {
    running_mean[c] = (1 - momentum) * running_mean[c] + momentum * mean[c];
    running_var[c] = (1 - momentum) * running_var[c] + momentum * unbiased * var[c];
  }
}

// One channel of y = (x − mean) · gamma / √(var + eps) + beta, centred first: x · scale + shift would lose digits
// where the mean is large. Forward and backward take the same steps, so that ReLU cuts both at the same pixels.
struct Channel {
  double mean, inverse_std;
  T scale, beta;
  __device__ Channel() {}
  __device__ Channel(double mean, double var, T gamma, T beta, double eps)
      : mean(mean), inverse_std(1 / sqrt(var + eps)), scale(gamma * inverse_std), beta(beta) {}
  __device__ T centred(T x) const { return x - mean; }
  __device__ T normalised(T x) const { return fma(centred(x), scale, beta); }
};

// The channels of a Pack.
struct Channels {
  Channel of[V];
  __device__ Channels(Index c, Numbers mean, Numbers var, Input gamma, Input beta, double eps) {
    for (int e = 0; e < V; ++e) of[e] = Channel(mean[c + e], var[c + e], gamma[c + e], beta[c + e], eps);
  }
};

// y, then max(0, y) if relu; NaN stays
KERNEL batch_norm(Input x, Index ld, Numbers mean, Numbers var, Input gamma, Input beta, double eps, Index relu,
                  Output y, Index rows, Index channels) {
  const Index c = COLUMN * V;
  if (c >= channels) return;
  const Channels channel(c, mean, var, gamma, beta, eps);
  EACH_ROW(r, rows) {
    const Pack values = pack(x + r * ld + c);
    Pack result;
    for (int e = 0; e < V; ++e) {
      const T value = channel.of[e].normalised(values.value[e]);
      result.value[e] = relu && value < 0 ? 0 : value;
    }
    pack(y + r * channels + c) = result;
  }
}

// dbeta = Σ g and dgamma = Σ g · (x − mean) / √(var + eps); g is dy, or 0 where relu cut y off
KERNEL batch_norm_sums_parts(Input dy, Index dy_ld, Input x, Index x_ld, Numbers mean, Numbers var, Input gamma,
                             Input beta, double eps, Index relu, double* parts, Index all, Index rows,
                             Index channels) {
  const Index c = COLUMN * V;
  double sums[2 * V]{};
  if (c < channels) {
    const Channels channel(c, mean, var, gamma, beta, eps);
    EACH_ROW(r, rows) {
      const Pack values = pack(x + r * x_ld + c), upstream = pack(dy + r * dy_ld + c);
      for (int e = 0; e < V; ++e) {
        const T value = values.value[e], g = relu && !(channel.of[e].normalised(value) > 0) ? 0 : upstream.value[e];
        sums[e] += g;
        sums[V + e] += (double)g * channel.of[e].centred(value);
      }
    }
    for (int e = 0; e < V; ++e) sums[V + e] *= channel.of[e].inverse_std;
  }
  leave(sums, parts, all, c, channels);
}

// sums[0] = dbeta and sums[1] = dgamma in double for what follows, and as results
KERNEL batch_norm_sums(Numbers parts, Index count, double* sums, Output dbeta, Output dgamma, Index channels) {
  const Index c = COLUMN;
  const double first = total(parts, count, 2, 0, channels, c), second = total(parts, count, 2, 1, channels, c);
  if (c < channels && threadIdx.y == 0) {
    dbeta[c] = sums[c] = first;
    dgamma[c] = sums[channels + c] = second;
  }
}

// dx = gamma / √(var + eps) · g                                   mean and var are constants
// dx = gamma / √(var + eps) · (g − dbeta / m − x̂ · dgamma / m)    mean and var are statistics of x, m its rows
KERNEL batch_norm_dx(Input dy, Index dy_ld, Input x, Index x_ld, Numbers mean, Numbers var, Input gamma, Input beta,
                     double eps, Index relu, Index through_statistics, Numbers sums, Output dx, Index all, Index rows,
                     Index channels) {
  const Index c = COLUMN * V;
  if (c >= channels) return;
  const Channels channel(c, mean, var, gamma, beta, eps);
  T by_mean[V], by_var[V];
  for (int e = 0; e < V; ++e) {
    by_mean[e] = sums[c + e] / rows;
    by_var[e] = channel.of[e].inverse_std * sums[all + c + e] / rows;
  }
  EACH_ROW(r, rows) {
    const Pack values = pack(x + r * x_ld + c), upstream = pack(dy + r * dy_ld + c);
    Pack result;
    for (int e = 0; e < V; ++e) {
      const T value = values.value[e];
      T g = relu && !(channel.of[e].normalised(value) > 0) ? 0 : upstream.value[e];
      if (through_statistics) g -= by_mean[e] + channel.of[e].centred(value) * by_var[e];
      result.value[e] = channel.of[e].scale * g;
    }
    pack(dx + r * all + c) = result;
  }
}

// d[c] = k + alpha / size · Σ x[b]² over the `size` channels b around c; an even size has its extra channel below c
__device__ inline T lrn_base(Input pixel, Index c, Index size, T alpha, T k, Index channels) {
  const Index last = min(c + (size - 1) / 2, channels - 1);
  T sum = 0;
  for (Index b = max(c - size / 2, (Index)0); b <= last; ++b) sum += pixel[b] * pixel[b];
  return k + alpha / size * sum;
}

// y[c] = x[c] / d[c]^beta
KERNEL lrn(Input x, Index ld, Index size, double alpha, double beta, double k, Output y, Index rows, Index channels) {
  const Index c = COLUMN;
  if (c >= channels) return;
  EACH_ROW(r, rows) {
    const T* pixel = x + r * ld;
    y[r * channels + c] = pixel[c] * pow(lrn_base(pixel, c, size, alpha, k, channels), (T)-beta);
  }
}

// dx[c] = dy[c] / d[c]^beta − 2 · alpha · beta / size · x[c] · Σ_b dy[b] · x[b] / d[b]^(beta + 1)
//
// b runs over the channels that have c as a neighbour.
KERNEL lrn_dx(Input dy, Index dy_ld, Input x, Index x_ld, Index size, double alpha, double beta, double k, Output dx,
              Index rows, Index channels) {
  const Index c = COLUMN;
  if (c >= channels) return;
  const T factor = 2 * alpha * beta / size;
  const Index low = max(c - (size - 1) / 2, (Index)0), high = min(c + size / 2, channels - 1);
  EACH_ROW(r, rows) {
    const T *pixel = x + r * x_ld, *upstream = dy + r * dy_ld;
    T direct = 0, through = 0;
    for (Index b = low; b <= high; ++b) {
      const T base = lrn_base(pixel, b, size, alpha, k, channels), share = upstream[b] * pow(base, (T)-beta);
      if (b == c) direct = share;
      through += share * pixel[b] / base;
    }
    dx[r * channels + c] = direct - factor * pixel[c] * through;
  }
}
