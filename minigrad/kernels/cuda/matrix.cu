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
