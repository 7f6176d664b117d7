#include "threads.h"

#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lowbit {
namespace {

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*thread)() = nullptr;
    int (*count)() = nullptr;

    OpenMP() {
#if defined(__linux__)
        std::string found;
        dl_iterate_phdr(
            [](dl_phdr_info* info, size_t, void* out) {
                std::string path = info->dlpi_name ? info->dlpi_name : "", name = path.substr(path.rfind('/') + 1);
                for (const char* known : {"libgomp", "libiomp5", "libomp"})
                    if (name.rfind(known, 0) == 0) {
                        *static_cast<std::string*>(out) = path;
                        return 1;
                    }
                return 0;
            },
            &found);
        void* library = found.empty() ? nullptr : dlopen(found.c_str(), RTLD_LAZY | RTLD_NOLOAD);
        if (!library) return;
        parallel = reinterpret_cast<decltype(parallel)>(dlsym(library, "GOMP_parallel"));
        thread = reinterpret_cast<decltype(thread)>(dlsym(library, "omp_get_thread_num"));
        count = reinterpret_cast<decltype(count)>(dlsym(library, "omp_get_num_threads"));
        if (!thread || !count) parallel = nullptr;
#endif
    }
};

const OpenMP& openmp() {
    static const OpenMP found;
    return found;
}

class Pool {  // threads that wait, first by spinning, then asleep
  public:
    void run(int threads, const std::function<void(int, int)>& work) {
        std::lock_guard<std::mutex> one(calls_);
        if (threads > int(workers_.size()) + 1) grow(threads);
        work_ = &work;
        threads_ = threads;
        left_.store(int(workers_.size()));
        {
            std::lock_guard<std::mutex> lock(mutex_);
            round_.fetch_add(1);
        }
        wake_.notify_all();
        work(0, threads);
        while (left_.load() > 0) pause();
    }

  private:
    void grow(int threads) {
        for (int id = int(workers_.size()) + 1; id < threads; id++) {
            int seen = round_.load();
            workers_.emplace_back([this, id, seen] { serve(id, seen); });
            workers_.back().detach();
        }
    }

    void serve(int id, int seen) {
        for (;;) {
            for (int spin = 0; spin < 20000 && round_.load() == seen; spin++) pause();
            if (round_.load() == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return round_.load() != seen; });
            }
            seen = round_.load();
            if (id < threads_) (*work_)(id, threads_);
            left_.fetch_sub(1);
        }
    }

    std::vector<std::thread> workers_;
    std::mutex calls_, mutex_;
    std::condition_variable wake_;
    std::atomic<int> round_{0}, left_{0};
    const std::function<void(int, int)>* work_ = nullptr;
    int threads_ = 0;
};

}  // namespace

void parallel(int threads, const std::function<void(int, int)>& work) {
    if (threads <= 1) return work(0, 1);
    if (openmp().parallel) {
        auto call = [](void* data) { (*static_cast<const std::function<void(int, int)>*>(data))(openmp().thread(), openmp().count()); };
        return openmp().parallel(call, const_cast<void*>(static_cast<const void*>(&work)), unsigned(threads), 0);
    }
    static Pool* pool = new Pool;  // lives as long as the process: its threads do
    pool->run(threads, work);
}

const char* thread_source() { return openmp().parallel ? "openmp" : "own"; }

void Barrier::wait(int threads) {
    if (threads <= 1) return;
    int round = round_.load(std::memory_order_acquire);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
        waiting_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    for (int spin = 0; round_.load(std::memory_order_acquire) == round; spin++) {
        if (spin < 4000)
            pause();
        else
            std::this_thread::yield();
    }
}

}  // namespace lowbit
