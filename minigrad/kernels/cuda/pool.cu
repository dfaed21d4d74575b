// y[n, i, j, c] = max over the window's cells inside the image of x[n, h, w, c]; NaN if one of them is NaN
KERNEL max_pool(Input x, Index ld, Output y, Index rows, Index channels, WINDOW) {
  const Index c = COLUMN * V;
  if (c >= channels) return;
  EACH_PIXEL(at, rows, oh, ow) {
    const Index top = max(at.i * sh - ph, (Index)0), bottom = min(at.i * sh - ph + kh, height);
    const Index left = max(at.j * sw - pw, (Index)0), right = min(at.j * sw - pw + kw, width);
    Pack best = pack(x + ((at.n * height + top) * width + left) * ld + c);
    for (Index h = top; h < bottom; ++h)
      for (Index w = left; w < right; ++w) {
        const Pack cell = pack(x + ((at.n * height + h) * width + w) * ld + c);
        for (int e = 0; e < V; ++e)
          if (cell.value[e] > best.value[e] || cell.value[e] != cell.value[e]) best.value[e] = cell.value[e];
      }
    pack(y + at.row * channels + c) = best;
  }
}

// The same along one axis of (outer, length, inner), row (a, i) of the result being one stop i:
//
//     best[a, i, c] = max_v x[a, i·s + v − p, c],     first[a, i, c] = the first v that has it; a NaN wins
//
// Across the columns of an image `outer` is n·H + h and `inner` the channel; down its rows n, and (j, c).
KERNEL max_along(Input x, Index ld, Output best_of, Cell* __restrict__ first_of, Index rows, Index inner, Index length,
                 Index k, Index s, Index p, Index out) {
  const Index c = COLUMN * V;
  if (c >= inner) return;
  EACH_PIXEL(at, rows, 1, out) {
    const Index start = at.j * s - p, low = max(start, (Index)0), end = min(start + k, length);
    Pack best = pack(x + (at.n * length + low) * ld + c);
    Cells first;
    for (int e = 0; e < V; ++e) first.value[e] = low - start;
    for (Index l = low + 1; l < end; ++l) {
      const Pack cell = pack(x + (at.n * length + l) * ld + c);
      for (int e = 0; e < V; ++e) {
        const T value = cell.value[e], most = best.value[e];
        if (value > most || (value != value && most == most)) best.value[e] = value, first.value[e] = l - start;
      }
    }
    pack(best_of + at.row * inner + c) = best;
    cells(first_of + at.row * inner + c) = first;
  }
}

// Its transpose: dx[a, l, c] = Σ of dy[a, i, c] over the stops i whose first maximum is cell l
KERNEL hand_along(Input dy, const Cell* __restrict__ first_of, Output dx, Index rows, Index inner, Index length,
                  Index k, Index s, Index p, Index out) {
  const Index c = COLUMN * V;
  if (c >= inner) return;
  EACH_PIXEL(at, rows, 1, length) {
    const Index last = last_stop(at.j, s, p, out);
    Pack sum{};
    for (Index i = first_stop(at.j, k, s, p); i <= last; ++i) {
      const Index stop = (at.n * out + i) * inner + c;
      const Cells first = cells(first_of + stop);
      const Pack gradient = pack(dy + stop);
      for (int e = 0; e < V; ++e)
        if (first.value[e] == at.j + p - i * s) sum.value[e] += gradient.value[e];
    }
    pack(dx + at.row * inner + c) = sum;
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
  EACH_PIXEL(at, rows, oh, ow) {
    const Index top = at.i * sh - ph, bottom = min(top + kh, height), left = at.j * sw - pw, right = min(left + kw, width);
    T sum = 0;
    for (Index h = max(top, (Index)0); h < bottom; ++h)
      for (Index w = max(left, (Index)0); w < right; ++w) sum += x[((at.n * height + h) * width + w) * ld + c];
    y[at.row * channels + c] =
        sum / (T)(counted(at.i, kh, sh, ph, height, count_padding) * counted(at.j, kw, sw, pw, width, count_padding));
  }
}

// dx[n, h, w, c] = Σ over the windows (i, j) that see (h, w) of dy[n, i, j, c] / (the cells that count)
KERNEL avg_pool_dx(Input dy, Index ld, Index count_padding, Output dx, Index rows, Index channels, WINDOW) {
  const Index c = COLUMN;
  if (c >= channels) return;
  EACH_PIXEL(at, rows, height, width) {
    const Index last_i = last_stop(at.i, sh, ph, oh), last_j = last_stop(at.j, sw, pw, ow);
    T sum = 0;
    for (Index i = first_stop(at.i, kh, sh, ph); i <= last_i; ++i)
      for (Index j = first_stop(at.j, kw, sw, pw); j <= last_j; ++j)
        sum += dy[((at.n * oh + i) * ow + j) * ld + c] /
               (T)(counted(i, kh, sh, ph, height, count_padding) * counted(j, kw, sw, pw, width, count_padding));
    dx[at.row * channels + c] = sum;
  }
}
