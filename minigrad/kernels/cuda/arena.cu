// An arena: many arrays as neighbours in one, see minigrad/arena.py.

typedef const long long* __restrict__ Integers;

// to[start + i] = from[i] for every array. Block b takes chunks[b]: the number of an array, its values first … last, and
// where it starts. addresses[number] says where the array lies; 0: there is none, and its place keeps its values.
KERNEL gather(Integers chunks, Integers addresses, Output to) {
  const long long* chunk = chunks + 4 * (long long)blockIdx.x;
  const T* from = reinterpret_cast<const T*>(addresses[chunk[0]]);
  if (!from) return;
  for (long long i = chunk[1] + threadIdx.y; i < chunk[2]; i += blockDim.y) to[chunk[3] + i] = from[i];
}
