// Kernels on the pixel matrix alone.

// y[r, c] = x[r, c], into some columns of a wider y
KERNEL copy_columns(Input x, Index x_ld, Output y, Index y_ld, Index rows, Index columns) {
  const Index c = COLUMN * V;
  if (c >= columns) return;
  EACH_ROW(r, rows) pack(y + r * y_ld + c) = pack(x + r * x_ld + c);
}

// y[r, c] += bias[c], then max(0, y) if relu; NaN stays
KERNEL add_bias(Output y, Input bias, Index relu, Index rows, Index columns) {
  const Index c = COLUMN;
  if (c >= columns) return;
  const T b = bias[c];
  EACH_ROW(r, rows) {
    const T value = y[r * columns + c] + b;
    y[r * columns + c] = relu && value < 0 ? 0 : value;
  }
}

// sums[c] = Σ_r x[r, c], first in parts
KERNEL column_sums_parts(Input x, Index ld, double* parts, Index rows, Index columns) {
  const Index c = COLUMN;
  double sum = 0;
  if (c < columns) EACH_ROW(r, rows) sum += x[r * ld + c];
  sum = down_the_block(sum, Sum());
  if (c < columns && threadIdx.y == 0) parts[blockIdx.x * columns + c] = sum;
}

KERNEL column_sums(Numbers parts, Index count, Output sums, Index columns) {
  const Index c = COLUMN;
  const double sum = total(parts, count, 1, 0, columns, c);
  if (c < columns && threadIdx.y == 0) sums[c] = sum;
}
