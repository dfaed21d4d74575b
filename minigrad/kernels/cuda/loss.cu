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
