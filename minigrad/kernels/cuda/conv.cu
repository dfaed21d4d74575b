// Convolutions are products (cuBLAS) with the patch matrix; here it is made, and its gradient is gathered.

// patches[(n, i, j), (u, v, c)] = x[n, h, w, c], or 0 where (h, w) is padding, and in columns beyond the window's
KERNEL im2col(Input x, Index ld, Output patches, Index rows, Index columns, Index channels, WINDOW) {
  const Index k = COLUMN * V;
  if (k >= columns) return;
  const Index c = k % channels, v = k / channels % kw, u = k / channels / kw;
  EACH_PIXEL(at, rows, oh, ow) {
    const Index h = at.i * sh + u - ph, w = at.j * sw + v - pw;
    const bool inside = u < kh && 0 <= h && h < height && 0 <= w && w < width;
    pack(patches + at.row * columns + k) = inside ? pack(x + ((at.n * height + h) * width + w) * ld + c) : Pack{};
  }
}

// dx[n, h, w, c] = Σ over the windows (i, j) that see (h, w) at (u, v): dpatches[(n, i, j), (u, v, c)]
KERNEL col2im(Input dpatches, Output dx, Index rows, Index channels, WINDOW) {
  const Index columns = kh * kw * channels, c = COLUMN * V;
  if (c >= channels) return;
  EACH_PIXEL(at, rows, height, width) {
    const Index last_i = last_stop(at.i, sh, ph, oh), last_j = last_stop(at.j, sw, pw, ow);
    Pack sum{};
    for (Index i = first_stop(at.i, kh, sh, ph); i <= last_i; ++i)
      for (Index j = first_stop(at.j, kw, sw, pw); j <= last_j; ++j) {
        const Index u = at.i + ph - i * sh, v = at.j + pw - j * sw;
        sum += pack(dpatches + ((at.n * oh + i) * ow + j) * columns + (u * kw + v) * channels + c);
      }
    pack(dx + at.row * channels + c) = sum;
  }
}
