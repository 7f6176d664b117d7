// Work in several threads. Where an OpenMP runtime is loaded already (torch brings one), its threads are used, so that there are never two sets that wait for each other's cores;
// else threads of our own.
#pragma once
#include <atomic>
#include <functional>

namespace lowbit {

// Runs work(thread, threads) in all threads and waits. threads may turn out smaller than asked for.
void parallel(int threads, const std::function<void(int, int)>& work);
const char* thread_source();  // "openmp" or "own"

class Barrier {  // for the threads of one parallel call
  public:
    void wait(int threads);

  private:
    std::atomic<int> waiting_{0}, round_{0};
};

}  // namespace lowbit
