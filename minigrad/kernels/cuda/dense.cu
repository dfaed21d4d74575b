// Kernels on the pixel matrix alone.

// y[r, c] = x[r, c], into some columns of a wider y
KERNEL copy_columns(Input x, Index x_ld, Output y, Index y_ld, Index rows, Index columns) {
  const Index c = COLUMN * V;
  if (c >= columns) return;
  EACH_ROW(r, rows) pack(y + r * y_ld + c) = pack(x + r * x_ld + c);
}

// y[r, c] += bias[c]
KERNEL add_bias(Output y, Input bias, Index rows, Index columns) {
  const Index c = COLUMN * V;
  if (c >= columns) return;
  const Pack b = pack(bias + c);
  EACH_ROW(r, rows) pack(y + r * columns + c) += b;
}

// sums[c] = Σ_r x[r, c], first in parts
KERNEL column_sums_parts(Input x, Index ld, double* parts, Index rows, Index columns) {
  const Index c = COLUMN * V;
  double sums[V]{};
  if (c < columns) EACH_ROW(r, rows) {
      const Pack values = pack(x + r * ld + c);
      for (int e = 0; e < V; ++e) sums[e] += values.value[e];
    }
  leave(sums, parts, columns, c, columns);
}

KERNEL column_sums(Numbers parts, Index count, Output sums, Index columns) {
  const Index c = COLUMN;
  const double sum = total(parts, count, 1, 0, columns, c);
  if (c < columns && threadIdx.y == 0) sums[c] = sum;
}

// losses[n] = −Σ_k target[k] · log p[k],   dlogits[n, k] = p[k] − target[k],   p = softmax(logits[n])
//
// target is 1 − smoothing at the label, plus smoothing / classes everywhere. A block takes a row at a time: its
// threads stand in one column of the block and share the classes.
KERNEL cross_entropy(Input logits, Index ld, const long long* __restrict__ labels, double smoothing, Output losses,
                     Output dlogits, Index rows, Index classes) {
  for (Index n = blockIdx.x; n < rows; n += gridDim.x) {
    Input z = logits + n * ld;
    double largest = z[0], sum = 0, loss = 0;
    for (Index k = threadIdx.y; k < classes; k += blockDim.y) largest = Largest()(largest, z[k]);
    largest = down_the_block(largest, Largest());  // the same softmax without it, but exp could overflow
    for (Index k = threadIdx.y; k < classes; k += blockDim.y) sum += exp(z[k] - largest);
    const double log_sum = log(down_the_block(sum, Sum()));
    for (Index k = threadIdx.y; k < classes; k += blockDim.y) {
      const double log_p = z[k] - largest - log_sum;
      const double target = smoothing / classes + (k == labels[n] ? 1 - smoothing : 0);
      if (target != 0) loss -= target * log_p;  // 0 · ∞ is NaN
      dlogits[n * classes + k] = exp(log_p) - target;
    }
    loss = down_the_block(loss, Sum());
    if (threadIdx.y == 0) losses[n] = loss;
  }
}

// y[n, j] = x[n, j] / (1 − p), or 0 where the random number of (n, j) is below p;   j = c · area + pixel
//
// The numbers are those of minigrad/random.py: a hash of the stream and of the element's place, in its row if rows are
// named and in all of x otherwise. The multipliers wrap around 2⁶⁴.
typedef unsigned long long Word;
constexpr Word GOLDEN = 0x9E3779B97F4A7C15;

__device__ inline Word mix(Word z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

KERNEL dropout(Input x, Index ld, const unsigned long long* __restrict__ stream, const long long* __restrict__ numbers,
               Index by_row, double p, Output y, Index rows, Index channels, Index area) {
  const Index c = COLUMN;
  if (c >= channels) return;
  const T scale = 1 / (1 - p);
  EACH_ROW(r, rows) {
    const Index n = r / area;
    const Word j = (Word)c * area + r % area;
    const Word start = by_row ? mix(stream[0] + ((Word)numbers[n] + 1) * GOLDEN) : stream[0];
    const Word place = by_row ? j : (Word)n * channels * area + j;
    const double u = (mix(start + (place + 1) * GOLDEN) >> 11) * 0x1p-53;
    y[r * channels + c] = x[r * ld + c] * (u >= p ? scale : 0);
  }
}
