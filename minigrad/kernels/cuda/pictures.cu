// y[(n, i), (j, c)] = table[level, c],   level = pictures[number, h, w, c]
//
// with h = i + down and w = (mirrored ? width − 1 − j : j) + right; outside the picture the level is 0, and in the
// square of `side` pixels from (top, left) of the result it is 256. changes[n] = number, down, right, mirrored, top, left.
// Here a row of the matrix is a row of pixels, so that neighbouring threads touch neighbouring bytes.
KERNEL augment(const unsigned char* __restrict__ pictures, const int* __restrict__ changes, Index side, Input table,
               Output y, Index rows, Index height, Index width, Index channels) {
  const Index column = COLUMN, j = column / channels, c = column % channels;
  if (j >= width) return;
  EACH_ROW(r, rows) {
    const Index i = r % height;
    const int* change = changes + r / height * 6;
    const Index h = i + change[1], w = (change[3] ? width - 1 - j : j) + change[2];
    const bool inside = h >= 0 && h < height && w >= 0 && w < width;
    const bool cut = i >= change[4] && i < change[4] + side && j >= change[5] && j < change[5] + side;
    Index level = 0;
    if (cut) level = 256;
    else if (inside) level = pictures[((change[0] * height + h) * width + w) * channels + c];
    y[r * width * channels + column] = table[level * channels + c];
  }
}
