// CUDA's language for a C++ compiler: kernels run on the CPU, one block after the other, one thread after the other.
//
// A thread runs until it ends or meets __syncthreads. There it is left, on a stack of its own (a fiber), and the next
// thread starts; when all have arrived they go on, in the same order. A kernel without barriers never changes stacks.
// Threads and blocks run first to last, or last to first: what lacks a barrier is right in one order at most.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>
#include <sys/mman.h>

#define __global__
#define __device__
#define __shared__ static
#define __restrict__ __restrict
using std::exp, std::fma, std::log, std::max, std::min, std::pow, std::sqrt;

struct Dim3 { unsigned x, y, z; };
static Dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---- Changing stacks: fifteen instructions on x86-64, ucontext elsewhere ----

#if defined(__x86_64__)
extern "C" void change_stack(void** from, void* to);
asm(R"(
.text
.globl change_stack
.hidden change_stack
.type change_stack, @function
change_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
struct Context {
  void* top;
  void start(char* stack, std::size_t size, void (*entry)()) {
    void** p = (void**)((std::uintptr_t)(stack + size) & ~(std::uintptr_t)15);
    *--p = nullptr;  // the return address of `entry`, which never returns: keeps the stack's alignment
    *--p = (void*)entry;
    for (int i = 0; i < 6; ++i) *--p = nullptr;
    top = p;
  }
  void change_to(Context& other) { change_stack(&top, other.top); }
};
#else
#include <ucontext.h>
struct Context {
  ucontext_t state;
  void start(char* stack, std::size_t size, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = size;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
  }
  void change_to(Context& other) { swapcontext(&state, &other.state); }
};
#endif

// ---- A block ----

static const std::size_t STACK = 64 * 1024;
static std::vector<Context> fibers;
static Context scheduler;
static char* stacks = nullptr;
static void (*body)(void**);
static void** arguments;
static unsigned current, started, threads, waiting;
static bool reversed;

static void run_threads() {
  for (;;) {
    while (started < threads) {
      const unsigned t = reversed ? threads - 1 - started : started;
      ++started;
      threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
      body(arguments);
    }
    fibers[current].change_to(scheduler);
  }
}

static void __syncthreads() {
  const Dim3 here = threadIdx;
  ++waiting;
  fibers[current].change_to(scheduler);
  threadIdx = here;
}

// False if some threads of the block ended while others waited: undefined on a GPU.
static bool run_block() {
  unsigned used = 0;
  started = waiting = 0;
  while (started < threads) {  // a new fiber for every thread that was left waiting, and one for all that end
    if (used == fibers.size()) fibers.emplace_back();
    current = used++;
    fibers[current].start(stacks + current * STACK, STACK, run_threads);
    scheduler.change_to(fibers[current]);
  }
  while (waiting) {
    if (waiting < threads) return false;
    waiting = 0;
    for (current = 0; current < threads; ++current) scheduler.change_to(fibers[current]);
  }
  return true;
}

static int run_grid(void (*kernel)(void**), void** args, const unsigned* grid, const unsigned* block, int backwards) {
  if (!stacks) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks = (char*)mmap(nullptr, 1024 * STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
    fibers.reserve(1024);
  }
  body = kernel, arguments = args, reversed = backwards;
  gridDim = {grid[0], grid[1], 1}, blockDim = {block[0], block[1], 1}, threads = block[0] * block[1];
  for (unsigned i = 0, blocks = grid[0] * grid[1]; i < blocks; ++i) {
    const unsigned b = reversed ? blocks - 1 - i : i;
    blockIdx = {b % grid[0], b / grid[0], 0};
    if (!run_block()) return 1;
  }
  return 0;
}

// ---- Calling a kernel: the types of its parameters, and the call with pointers to its arguments ----

template <typename A> const char* type_name();
#define TYPE(type, name) template <> const char* type_name<type>() { return name; }
TYPE(int, "int32") TYPE(long long, "int64") TYPE(double, "float64")
TYPE(float*, "float32 array") TYPE(const float*, "float32 array")
TYPE(double*, "float64 array") TYPE(const double*, "float64 array")
TYPE(signed char*, "int8 array") TYPE(const signed char*, "int8 array")
TYPE(const unsigned char*, "uint8 array") TYPE(const int*, "int32 array") TYPE(const long long*, "int64 array")
TYPE(const unsigned long long*, "uint64 array")

template <auto kernel> struct Kernel;
template <typename... A, void (*kernel)(A...)> struct Kernel<kernel> {
  static const char* parameters() {
    static std::string names;
    if (names.empty()) (void)std::initializer_list<int>{(names += type_name<A>(), names += ",", 0)...};
    return names.c_str();
  }
  template <std::size_t... i> static void call(void** args, std::index_sequence<i...>) { kernel(*(A*)args[i]...); }
  static void with(void** args) { call(args, std::index_sequence_for<A...>()); }
};

#define EXPORT(kernel) \
  extern "C" __attribute__((visibility("default"))) const char* kernel##_parameters() { \
    return Kernel<kernel>::parameters(); \
  } \
  extern "C" __attribute__((visibility("default"))) int kernel##_run( \
      void** args, const unsigned* grid, const unsigned* block, int backwards) { \
    return run_grid(Kernel<kernel>::with, args, grid, block, backwards); \
  }
