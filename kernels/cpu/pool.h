// One team of threads for compilers without OpenMP; see parallel.h, which is what kernels use.
#pragma once

namespace headstart {

// Calls work(context) on `threads` threads, this one among them; returns when all have ended.
// Calls from several threads come one after the other; a call from inside a region never returns.
void run_on_threads(int threads, void (*work)(void*), void* context);

// Inside a region: waits until all its threads are here.
void await_threads();

}  // namespace headstart
