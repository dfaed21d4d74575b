// Optimizers, and the average of weights: one launch for all parameters of a model, however many and however large.
//
// The values of all of them are cut into chunks. Block b takes chunks[b], which names a row of the tables and a part of
// its values, first … last. addresses[row] says where the row's arrays lie, 0 for one that it does not have (no address
// at all: the row is left alone); numbers[row] what its formula is given. The formulas are those of minigrad/optim.py.

typedef const long long* __restrict__ Integers;

struct Part {
  const long long *address;
  const double *number;
  long long first, last;
  __device__ Part(Integers chunks, Integers addresses, Index arrays, Numbers numbers, Index count) {
    const long long* chunk = chunks + 3 * (long long)blockIdx.x;
    address = addresses + chunk[0] * arrays;
    number = numbers + chunk[0] * count;
    first = chunk[1] + threadIdx.y;
    last = address[0] ? chunk[2] : 0;
  }
  __device__ T* array(int k) const { return reinterpret_cast<T*>(address[k]); }
};

#define EACH_VALUE(i, part) for (long long i = (part).first; i < (part).last; i += blockDim.y)

// d = g + λ·p,   v = μ·v + d,   p −= lr·v; Nesterov: p −= lr·(d + μ·v); without v: p −= lr·d
KERNEL sgd(Integers chunks, Integers addresses, Index arrays, Numbers numbers, Index count) {
  const Part part(chunks, addresses, arrays, numbers, count);
  T *p = part.array(0), *g = part.array(1), *v = part.array(2);
  const T lr = part.number[0], momentum = part.number[2], nesterov = part.number[3], decay = part.number[4];
  EACH_VALUE(i, part) {
    T d = g[i] + decay * p[i];
    if (v) {
      v[i] = momentum * v[i] + d;
      d = nesterov ? d + momentum * v[i] : v[i];
    }
    p[i] -= lr * d;
  }
}

// d = g + λ·p,   s = α·s + (1 − α)·d²,   v = μ·v + d / (√s + ε),   p −= lr·v; without v: p −= lr·d / (√s + ε)
KERNEL rmsprop(Integers chunks, Integers addresses, Index arrays, Numbers numbers, Index count) {
  const Part part(chunks, addresses, arrays, numbers, count);
  T *p = part.array(0), *g = part.array(1), *s = part.array(2), *v = part.array(3);
  const T lr = part.number[0], alpha = part.number[2], rest = 1 - part.number[2], eps = part.number[3];
  const T momentum = part.number[4], decay = part.number[5];
  EACH_VALUE(i, part) {
    T d = g[i] + decay * p[i];
    s[i] = alpha * s[i] + rest * d * d;
    d /= sqrt(s[i]) + eps;
    if (v) d = v[i] = momentum * v[i] + d;
    p[i] -= lr * d;
  }
}

// m = β₁·m + (1 − β₁)·g,   s = β₂·s + (1 − β₂)·g²,   p = (1 − lr·λ)·p − lr · m / (1 − β₁ᵗ) / (√(s / (1 − β₂ᵗ)) + ε)
KERNEL adamw(Integers chunks, Integers addresses, Index arrays, Numbers numbers, Index count) {
  const Part part(chunks, addresses, arrays, numbers, count);
  T *p = part.array(0), *g = part.array(1), *m = part.array(2), *s = part.array(3);
  const double lr = part.number[0], t = part.number[1], beta1 = part.number[2], beta2 = part.number[3];
  const T rest1 = 1 - beta1, rest2 = 1 - beta2, kept2 = beta2, eps = part.number[4], kept = 1 - lr * part.number[5];
  const T step = lr / (1 - pow(beta1, t)), unbiased = 1 / sqrt(1 - pow(beta2, t));
  EACH_VALUE(i, part) {
    m[i] += rest1 * (g[i] - m[i]);
    s[i] = kept2 * s[i] + rest2 * g[i] * g[i];
    p[i] = kept * p[i] - step * m[i] / (sqrt(s[i]) * unbiased + eps);
  }
}

// v = μ·v + g,   d = g + μ·v, and when d is orthogonal,
KERNEL muon_momentum(Integers chunks, Integers addresses, Index arrays, Numbers numbers, Index count) {
  const Part part(chunks, addresses, arrays, numbers, count);
  T *g = part.array(1), *v = part.array(2), *d = part.array(3);
  const T momentum = part.number[2];
  EACH_VALUE(i, part) {
    v[i] = momentum * v[i] + g[i];
    d[i] = g[i] + momentum * v[i];
  }
}

// p = (1 − lr·λ)·p − lr·d
KERNEL muon(Integers chunks, Integers addresses, Index arrays, Numbers numbers, Index count) {
  const Part part(chunks, addresses, arrays, numbers, count);
  T *p = part.array(0), *d = part.array(3);
  const T lr = part.number[0], kept = 1 - part.number[0] * part.number[3];
  EACH_VALUE(i, part) p[i] = kept * p[i] - lr * d[i];
}

// sum = d·sum + w
KERNEL average(Integers chunks, Integers addresses, Index arrays, Numbers numbers, Index count) {
  const Part part(chunks, addresses, arrays, numbers, count);
  T *sum = part.array(0), *w = part.array(1);
  const T decay = part.number[0];
  EACH_VALUE(i, part) sum[i] = decay * sum[i] + w[i];
}

// The joint norm of all gradients, and these scaled down to it, in two kernels: parts[b] = Σ g² of chunk b,
KERNEL squares(Integers chunks, Integers addresses, Index arrays, Numbers numbers, Index count, double* squares) {
  const Part part(chunks, addresses, arrays, numbers, count);
  const T* g = part.array(1);
  double sum = 0;
  EACH_VALUE(i, part) sum += (double)g[i] * g[i];
  sum = down_the_block(sum, Sum());
  if (threadIdx.y == 0) squares[blockIdx.x] = sum;
}

// then norm = √Σ parts in every block anew, and out = g · min(1, most / (norm + 1e-6)); NaN stays
KERNEL clip(Integers chunks, Integers addresses, Index arrays, Numbers numbers, Index count, Numbers squares,
            Index blocks, double* norm) {
  const Part part(chunks, addresses, arrays, numbers, count);
  T *out = part.array(0), *g = part.array(1);
  double sum = 0;
  for (Index b = threadIdx.y; b < blocks; b += blockDim.y) sum += squares[b];
  const double all = sqrt(down_the_block(sum, Sum())), share = part.number[0] / (all + 1e-6);
  const T factor = share >= 1 ? 1 : share;
  EACH_VALUE(i, part) out[i] = factor * g[i];
  if (blockIdx.x == 0 && threadIdx.y == 0) norm[0] = all;
}
