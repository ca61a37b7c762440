// A GPU as far as our kernels see one: the threads of a block are contexts of one thread of the CPU, which change at
// barriers and shuffles. What only a GPU shows stays unseen: races between barriers, launches, speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#include "../../ops/csrc/cpu/simd.h"

#define TENFOLD_EMULATED
#define __global__ static
#define __device__
#define __host__
#define __launch_bounds__(...)

using std::exp;

namespace emulated {

constexpr int kWarp = 32, kStackBytes = 1 << 16;

struct Index {
  int64_t x, y;
};

enum class Waits { kNo, kForWarp, kForBlock, kDone };

struct Thread {
  jmp_buf at;  // where it waits: changing places this way takes no system call
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Waits waits = Waits::kNo;
  // What it shows to its warp, in turns: nobody is two turns ahead of a thread that still has to look.
  double shown[2] = {};
  int turn = 0;
};

inline std::vector<Thread> threads;
inline std::vector<char> shared;
inline jmp_buf scheduler;
inline std::function<void()> kernel;
inline size_t running = 0;

inline void wait(Waits what) {
  threads[running].waits = what;
  if (!_setjmp(threads[running].at)) _longjmp(scheduler, 1);
}

inline void run_kernel() {
  kernel();
  wait(Waits::kDone);
}

// Until it waits.
inline void go_on(Thread& thread) {
  if (_setjmp(scheduler)) return;
  if (thread.started) _longjmp(thread.at, 1);
  thread.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack.get(), context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, run_kernel, 0);
  setcontext(&context);
}

// Those of [first, last) that are not done wait for `what`: they go on.
inline bool release(size_t first, size_t last, Waits what) {
  bool any = false;
  for (size_t i = first; i < last; ++i) {
    if (threads[i].waits != what && threads[i].waits != Waits::kDone) return false;
    any |= threads[i].waits == what;
  }
  for (size_t i = first; any && i < last; ++i) {
    if (threads[i].waits == what) threads[i].waits = Waits::kNo;
  }
  return any;
}

}  // namespace emulated

inline emulated::Index blockIdx, threadIdx, gridDim;

inline void __syncwarp() { emulated::wait(emulated::Waits::kForWarp); }
inline void __syncthreads() { emulated::wait(emulated::Waits::kForBlock); }

// The turn in which all of the warp show a number.
inline int show(double number) {
  emulated::Thread& own = emulated::threads[emulated::running];
  const int turn = own.turn;
  own.shown[turn] = number, own.turn = 1 - turn;
  __syncwarp();
  return turn;
}

template <class T>
T __shfl_xor_sync(unsigned, T number, int distance) {
  const int turn = show(static_cast<double>(number));
  return static_cast<T>(emulated::threads[emulated::running ^ distance].shown[turn]);
}

inline bool __any_sync(unsigned, bool number) {
  const int turn = show(number);
  const size_t first = emulated::running / emulated::kWarp * emulated::kWarp;
  bool any = false;
  for (size_t i = first; i < first + emulated::kWarp; ++i) any |= emulated::threads[i].shown[turn] != 0;
  return any;
}

inline int64_t float_adds = 0;

template <class A>
A atomicAdd(A* sum, A number) {
  float_adds += std::is_same_v<A, float>;
  const A before = *sum;
  *sum += number;
  return before;
}

inline int atomicCAS(int* at, int expected, int number) {
  const int before = *at;
  if (before == expected) *at = number;
  return before;
}

template <class A>
void atomicMax(A* largest, A number) {
  if (number > *largest) *largest = number;
}

inline unsigned __float_as_uint(float number) {
  unsigned bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}
inline long long __double_as_longlong(double number) {
  long long bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}

namespace tenfold {
namespace {
char* shared_memory() { return emulated::shared.data(); }
}  // namespace
}  // namespace tenfold

namespace emulated {

// Every block after the other. False: some threads wait for others that are done or wait elsewhere.
inline bool launch(Index blocks, int threads_of_block, size_t shared_bytes, const std::function<void()>& work) {
  kernel = work;
  gridDim = blocks;
  for (int64_t block = 0; block < blocks.x * blocks.y; ++block) {
    blockIdx = {block % blocks.x, block / blocks.x};
    shared.assign(shared_bytes, static_cast<char>(0xff));  // NaN
    threads.resize(threads_of_block);
    for (Thread& thread : threads) thread.started = false, thread.waits = Waits::kNo, thread.turn = 0;
    for (;;) {
      bool all_done = true;
      for (running = 0; running < threads.size(); ++running) {
        threadIdx.x = static_cast<int64_t>(running);
        if (threads[running].waits == Waits::kNo) go_on(threads[running]);
        all_done &= threads[running].waits == Waits::kDone;
      }
      if (all_done) break;
      bool any = release(0, threads.size(), Waits::kForBlock);
      for (size_t first = 0; first < threads.size(); first += kWarp) {
        any |= release(first, first + kWarp, Waits::kForWarp);
      }
      if (!any) return false;
    }
  }
  return true;
}

inline bool launch(int64_t blocks, int threads_of_block, size_t shared_bytes, const std::function<void()>& work) {
  return launch(Index{blocks, 1}, threads_of_block, shared_bytes, work);
}

}  // namespace emulated
