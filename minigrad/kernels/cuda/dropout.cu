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
