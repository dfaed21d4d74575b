// Batch norm: every column of the pixel matrix on its own. Sums and a channel's numbers are in double: float loses
// digits over many pixels, and where the mean is large. Local response normalisation: every pixel on its own.

// Σ (x − shift) and Σ (x − shift)² over the rows. The channel's first value is the shift: what is left is of the size
// of the standard deviation, so that the variance is not a small difference of large squares.
KERNEL statistics_parts(Input x, Index ld, double* parts, Index rows, Index channels) {
  const Index c = COLUMN;
  double sum = 0, squares = 0;
  if (c < channels) {
    const double shift = x[c];
    EACH_ROW(r, rows) {
      const double d = x[r * ld + c] - shift;
      sum += d;
      squares += d * d;
    }
  }
  sum = down_the_block(sum, Sum());
  squares = down_the_block(squares, Sum());
  if (c < channels && threadIdx.y == 0) {
    parts[(blockIdx.x * 2 + 0) * channels + c] = sum;
    parts[(blockIdx.x * 2 + 1) * channels + c] = squares;
  }
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

// One channel of y = (x − mean) · gamma / √(var + eps) + beta, centred first: x · scale + shift would lose digits
// where the mean is large. Forward and backward take the same steps, so that ReLU cuts both at the same pixels.
struct Channel {
  double mean, inverse_std;
  T scale, beta;
  __device__ Channel(double mean, double var, T gamma, T beta, double eps)
      : mean(mean), inverse_std(1 / sqrt(var + eps)), scale(gamma * inverse_std), beta(beta) {}
  __device__ T centred(T x) const { return x - mean; }
  __device__ T normalised(T x) const { return fma(centred(x), scale, beta); }
};

// y, then max(0, y) if relu; NaN stays
KERNEL batch_norm(Input x, Index ld, Numbers mean, Numbers var, Input gamma, Input beta, double eps, Index relu,
                  Output y, Index rows, Index channels) {
  const Index c = COLUMN;
  if (c >= channels) return;
  const Channel channel(mean[c], var[c], gamma[c], beta[c], eps);
  EACH_ROW(r, rows) {
    const T value = channel.normalised(x[r * ld + c]);
    y[r * channels + c] = relu && value < 0 ? 0 : value;
  }
}

// dbeta = Σ g and dgamma = Σ g · (x − mean) / √(var + eps); g is dy, or 0 where relu cut y off
KERNEL batch_norm_sums_parts(Input dy, Index dy_ld, Input x, Index x_ld, Numbers mean, Numbers var, Input gamma,
                             Input beta, double eps, Index relu, double* parts, Index all, Index rows,
                             Index channels) {
  const Index c = COLUMN;
  double dbeta = 0, dgamma = 0;
  if (c < channels) {
    const Channel channel(mean[c], var[c], gamma[c], beta[c], eps);
    EACH_ROW(r, rows) {
      const T value = x[r * x_ld + c], g = relu && !(channel.normalised(value) > 0) ? 0 : dy[r * dy_ld + c];
      dbeta += g;
      dgamma += (double)g * channel.centred(value);
    }
    dgamma *= channel.inverse_std;
  }
  dbeta = down_the_block(dbeta, Sum());
  dgamma = down_the_block(dgamma, Sum());
  if (c < channels && threadIdx.y == 0) {
    parts[(blockIdx.x * 2 + 0) * all + c] = dbeta;
    parts[(blockIdx.x * 2 + 1) * all + c] = dgamma;
  }
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
  const Index c = COLUMN;
  if (c >= channels) return;
  const Channel channel(mean[c], var[c], gamma[c], beta[c], eps);
  const T by_mean = sums[c] / rows, by_var = channel.inverse_std * sums[all + c] / rows;
  EACH_ROW(r, rows) {
    const T value = x[r * x_ld + c];
    T g = relu && !(channel.normalised(value) > 0) ? 0 : dy[r * dy_ld + c];
    if (through_statistics) g -= by_mean + channel.centred(value) * by_var;
    dx[r * all + c] = channel.scale * g;
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
