// y[n, i, j, c] = max over the window's cells inside the image of x[n, h, w, c]; NaN if one of them is NaN
KERNEL max_pool(Input x, Index ld, Output y, Index rows, Index channels, WINDOW) {
  const Index c = COLUMN;
  if (c >= channels) return;
  EACH_ROW(r, rows) {
    const Index j = r % ow, i = r / ow % oh, n = r / ow / oh;
    const Index top = max(i * sh - ph, (Index)0), bottom = min(i * sh - ph + kh, height);
    const Index left = max(j * sw - pw, (Index)0), right = min(j * sw - pw + kw, width);
    T best = x[((n * height + top) * width + left) * ld + c];
    for (Index h = top; h < bottom; ++h)
      for (Index w = left; w < right; ++w) {
        const T cell = x[((n * height + h) * width + w) * ld + c];
        if (cell > best || cell != cell) best = cell;
      }
    y[r * channels + c] = best;
  }
}

// The same along one axis of (outer, length, inner), row (a, i) of the result being one stop i:
//
//     best[a, i, c] = max_v x[a, i·s + v − p, c],     first[a, i, c] = the first v that has it; a NaN wins
//
// Across the columns of an image `outer` is n·H + h and `inner` the channel; down its rows n, and (j, c).
KERNEL max_along(Input x, Index ld, Output best_of, signed char* __restrict__ first_of, Index rows, Index inner,
                 Index length, Index k, Index s, Index p, Index out) {
  const Index c = COLUMN;
  if (c >= inner) return;
  EACH_ROW(r, rows) {
    const Index i = r % out, a = r / out, start = i * s - p, end = min(start + k, length);
    Index first = max(start, (Index)0);
    T best = x[(a * length + first) * ld + c];
    for (Index l = first + 1; l < end; ++l) {
      const T cell = x[(a * length + l) * ld + c];
      if (cell > best || (cell != cell && best == best)) best = cell, first = l;
    }
    best_of[r * inner + c] = best;
    first_of[r * inner + c] = first - start;
  }
}

// Its transpose: dx[a, l, c] = Σ of dy[a, i, c] over the stops i whose first maximum is cell l
KERNEL hand_along(Input dy, const signed char* __restrict__ first, Output dx, Index rows, Index inner,
                  Index length, Index k, Index s, Index p, Index out) {
  const Index c = COLUMN;
  if (c >= inner) return;
  EACH_ROW(r, rows) {
    const Index l = r % length, a = r / length, last = last_stop(l, s, p, out);
    T sum = 0;
    for (Index i = first_stop(l, k, s, p); i <= last; ++i) {
      const Index cell = (a * out + i) * inner + c;
      if (first[cell] == l + p - i * s) sum += dy[cell];
    }
    dx[r * inner + c] = sum;
  }
}

// Cells of stop i along one axis that count: those inside the image, or inside the padded image.
__device__ inline Index counted(Index i, Index k, Index s, Index p, Index length, Index count_padding) {
  const Index start = i * s - p, low = count_padding ? -p : 0, high = count_padding ? length + p : length;
  return min(start + k, high) - max(start, low);
}

// y[n, i, j, c] = Σ over the window's cells inside the image of x[n, h, w, c] / (the cells that count)
KERNEL avg_pool(Input x, Index ld, Index count_padding, Output y, Index rows, Index channels, WINDOW) {
  const Index c = COLUMN;
  if (c >= channels) return;
  EACH_ROW(r, rows) {
    const Index j = r % ow, i = r / ow % oh, n = r / ow / oh;
    const Index bottom = min(i * sh - ph + kh, height), right = min(j * sw - pw + kw, width);
    T sum = 0;
    for (Index h = max(i * sh - ph, (Index)0); h < bottom; ++h)
      for (Index w = max(j * sw - pw, (Index)0); w < right; ++w) sum += x[((n * height + h) * width + w) * ld + c];
    y[r * channels + c] =
        sum / (T)(counted(i, kh, sh, ph, height, count_padding) * counted(j, kw, sw, pw, width, count_padding));
  }
}

// dx[n, h, w, c] = Σ over the windows (i, j) that see (h, w) of dy[n, i, j, c] / (the cells that count)
KERNEL avg_pool_dx(Input dy, Index ld, Index count_padding, Output dx, Index rows, Index channels, WINDOW) {
  const Index c = COLUMN;
  if (c >= channels) return;
  EACH_ROW(r, rows) {
    const Index w = r % width, h = r / width % height, n = r / width / height;
    const Index last_i = last_stop(h, sh, ph, oh), last_j = last_stop(w, sw, pw, ow);
    T sum = 0;
    for (Index i = first_stop(h, kh, sh, ph); i <= last_i; ++i)
      for (Index j = first_stop(w, kw, sw, pw); j <= last_j; ++j)
        sum += dy[((n * oh + i) * ow + j) * ld + c] /
               (T)(counted(i, kh, sh, ph, height, count_padding) * counted(j, kw, sw, pw, width, count_padding));
    dx[r * channels + c] = sum;
  }
}
