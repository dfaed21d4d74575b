// What the kernels of this folder share. In front of it, launch.py defines
//
//     T       float or double, as the images are
//     Index   int, or long long where an array is too long for int
//     V       how many neighbouring values one thread moves at once where a kernel says Pack: 16 bytes of them, or 1
//
// Every kernel computes a matrix. A thread stays in one column and walks down rows, so that what belongs to a column
// (a channel's mean, a cell of the window) is worked out once, and the 32 threads of a warp touch neighbouring memory.
// Rows of a matrix that is read may be `ld` values apart: it may be some columns of a wider one.
// Images are (N, H, W, C) here: row (n·H + h)·W + w of the pixel matrix holds the channels of pixel (h, w) of image n.

typedef const T* __restrict__ Input;
typedef T* __restrict__ Output;
typedef const double* __restrict__ Numbers;

#define KERNEL extern "C" __global__ void
#define COLUMN (blockIdx.y * (Index)blockDim.x + threadIdx.x)
#define EACH_ROW(r, rows) \
  for (Index r = blockIdx.x * (Index)blockDim.y + threadIdx.y; r < (rows); r += gridDim.x * (Index)blockDim.y)

// A minigrad.layout.Window, field by field; h = i·sh + u − ph, w = j·sw + v − pw.
#define WINDOW \
  Index height, Index width, Index kh, Index kw, Index sh, Index sw, Index ph, Index pw, Index oh, Index ow

// The rows of EACH_ROW where they are the pixels (n, i, j) of images of this size: a division takes as long as twenty
// additions, so that the steps from row to row are taken apart once.
struct Walk {
  const Index height, width, step, step_n, step_i, step_j;
  Index row, n, i, j;
  __device__ Walk(Index height, Index width)
      : height(height), width(width), step(gridDim.x * (Index)blockDim.y), step_n(step / width / height),
        step_i(step / width % height), step_j(step % width), row(blockIdx.x * (Index)blockDim.y + threadIdx.y),
        n(row / width / height), i(row / width % height), j(row % width) {}
  __device__ void next() {
    row += step, n += step_n, i += step_i, j += step_j;
    if (j >= width) j -= width, ++i;
    if (i >= height) i -= height, ++n;
  }
};
#define EACH_PIXEL(at, rows, height, width) for (Walk at(height, width); at.row < (rows); at.next())

struct alignas(V * sizeof(T)) Pack {
  T value[V];
  __device__ void operator+=(const Pack& other) {
    for (int i = 0; i < V; ++i) value[i] += other.value[i];
  }
};

__device__ inline const Pack& pack(const T* values) { return *reinterpret_cast<const Pack*>(values); }
__device__ inline Pack& pack(T* values) { return *reinterpret_cast<Pack*>(values); }

typedef signed char Cell;  // the number of a cell in its row, or column, of a window
struct alignas(V) Cells {
  Cell value[V];
};

__device__ inline const Cells& cells(const Cell* values) { return *reinterpret_cast<const Cells*>(values); }
__device__ inline Cells& cells(Cell* values) { return *reinterpret_cast<Cells*>(values); }

// Along one axis: the stops first … last of a window of k cells that see cell h.
__device__ inline Index first_stop(Index h, Index k, Index s, Index p) { return max((h + p - k + s) / s, (Index)0); }
__device__ inline Index last_stop(Index h, Index s, Index p, Index out) { return min((h + p) / s, out - 1); }

// Sum (or combine) values over the threads of a block that stand in the same column: each gets the results. It is
// a tree over threadIdx.y, always in the same order. blockDim.y is a power of two.
template <int N, typename Combine>
__device__ inline void down_the_block(double (&values)[N], Combine combine) {
  __shared__ double all[N][THREADS];
  const int width = blockDim.x, me = threadIdx.y * width + threadIdx.x;
  for (int k = 0; k < N; ++k) all[k][me] = values[k];
  __syncthreads();
  for (int half = blockDim.y / 2; half > 0; half /= 2) {
    if (threadIdx.y < half)
      for (int k = 0; k < N; ++k) all[k][me] = combine(all[k][me], all[k][me + half * width]);
    __syncthreads();
  }
  for (int k = 0; k < N; ++k) values[k] = all[k][threadIdx.x];
  __syncthreads();  // the next call writes them again
}

template <typename Combine>
__device__ inline double down_the_block(double value, Combine combine) {
  double values[1] = {value};
  down_the_block(values, combine);
  return values[0];
}

struct Sum {
  __device__ double operator()(double a, double b) const { return a + b; }
};
struct Largest {
  __device__ double operator()(double a, double b) const { return a > b ? a : b; }
};

// Sums over all rows of a matrix take two kernels: in the first, block b of the grid adds its rows into parts[b][k][c],
// sum k of column c, of a thread's columns at once; the second, a single row of blocks, adds the parts. No atomics: the
// same bits in every run. `all` is the number of columns of `parts`.
template <int N>
__device__ inline void leave(double (&sums)[N], double* parts, Index all, Index c, Index columns) {
  down_the_block(sums, Sum());
  if (c < columns && threadIdx.y == 0)
    for (int k = 0; k < N / V; ++k)
      for (int e = 0; e < V; ++e) parts[(blockIdx.x * (N / V) + k) * all + c + e] = sums[k * V + e];
}

__device__ inline double total(Numbers parts, Index count, Index sums, Index k, Index all, Index c) {
  double value = 0;
  for (Index b = threadIdx.y; c < all && b < count; b += blockDim.y) value += parts[(b * sums + k) * all + c];
  return down_the_block(value, Sum());
}
