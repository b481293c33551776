// A stand-in for libcuda.so.1 on a machine without a GPU: the entry points that the program calls, on host memory. Kernels
// come from nvrtc.cpp, compiled for the host; every thread of a block is a fiber.
//
// It is stricter than a GPU. Each allocation ends at a page that cannot be touched, and a pattern stands before it; new
// memory and the shared memory of each block hold signalling NaN; blocks, and the threads between two barriers, run in an
// order drawn by chance; a barrier that not all threads reach is an error. As with a GPU, what fails in a kernel is
// reported by a later call, and by all calls from then on.
//
// The environment decides about the machine:
//   CUDA_EMULATOR_DEVICES    number of GPUs (1)
//   CUDA_EMULATOR_CAPABILITY their compute capability (80 for 8.0)
//   CUDA_EMULATOR_VERSION    CUDA version of the driver (12090)
//   CUDA_EMULATOR_MEMORY     bytes of memory (2^31)
//   CUDA_EMULATOR_LOSE_AFTER the GPU is lost after this many kernels (never)
//   CUDA_EMULATOR_LOSE_AFTER_CALLS the GPU is lost after this many calls of cuBLAS and cuSOLVER that compute (never)
//   CUDA_EMULATOR_NO_GRAPHS  whether streams refuse to take notes (0)
//   CUDA_EMULATOR_SEED       of the order of blocks and threads (1)

#include "device.h"

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <iterator>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

typedef int CUresult;
typedef unsigned long long CUdeviceptr;

enum : CUresult {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    CAPTURE_UNSUPPORTED = 900,
    NOT_FOUND = 500,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_FAILED = 719,
};

static std::recursive_mutex all;
#define LOCK std::lock_guard<std::recursive_mutex> lock(all)

static unsigned long long setting(const char* name, unsigned long long otherwise) {
    const char* text = getenv(name);
    return text ? strtoull(text, nullptr, 10) : otherwise;
}

// ---- Failures: the first stays, and is the answer to every call.

static CUresult sticky = OK;
static std::string sticky_text;
// Why a call was refused that changes nothing.
static std::string refusal = "refused by the CUDA emulator";

static void fail(CUresult code, const std::string& text) {
    if (sticky != OK) return;
    sticky = code;
    sticky_text = text;
}

// ---- Memory.

static const unsigned POISON = 0xffa5a5a5u; // a signalling NaN

struct Allocation {
    size_t bytes;
    char *mapping, *pages, *pages_end;
    size_t mapped;
};

static std::map<CUdeviceptr, Allocation> allocations;
static size_t used, used_most;
// What the pool has got and keeps. A pool gets more when it has too little, as a driver does it; the program should have
// reserved what it needs.
static unsigned long long reserved, growths;
// How often the host has waited for the GPU, what it has asked it for (kernels, products, copies, fills), and how often for
// memory or to take it back; of what it was asked for, graphs.
static unsigned long long waits, requests, memory_requests, graphs;

static void poison(void* start, size_t bytes) {
    for (size_t i = 0; i + 4 <= bytes; i += 4) memcpy((char*)start + i, &POISON, 4);
}

static size_t page() {
    static const size_t size = sysconf(_SC_PAGESIZE);
    return size;
}

// What stands before an allocation was there when it was made.
static void check_before(CUdeviceptr address, const Allocation& a) {
    for (const char* p = a.pages; p + 4 <= (char*)address; p += 4) {
        if (memcmp(p, &POISON, 4)) {
            fail(ILLEGAL_ADDRESS, "something was written " + std::to_string((char*)address - p) +
                                      " bytes before an allocation of " + std::to_string(a.bytes) + " bytes");
            return;
        }
    }
}

static std::string place(const char* address) {
    for (auto& [start, a] : allocations) {
        if (address < a.mapping || address >= a.mapping + a.mapped) continue;
        long beyond = address - (char*)start - (long)a.bytes;
        if (beyond >= 0) {
            return std::to_string(beyond) + " bytes beyond an allocation of " + std::to_string(a.bytes) + " bytes";
        }
        return std::to_string((char*)start - address) + " bytes before an allocation of " + std::to_string(a.bytes) +
               " bytes";
    }
    char text[64];
    snprintf(text, sizeof text, "address %p, in no allocation", (const void*)address);
    return text;
}

// ---- What touches memory runs between `protect`'s setjmp and its end.

static sigjmp_buf escape;
static volatile bool guarded;
static std::string running;
static struct sigaction before_us[2];

static void on_fault(int signal, siginfo_t* info, void*) {
    if (!guarded) {
        sigaction(signal, &before_us[signal == SIGBUS], nullptr);
        return;
    }
    fail(ILLEGAL_ADDRESS, "an illegal memory access was encountered: " + running + ", " + place((char*)info->si_addr));
    siglongjmp(escape, 1);
}

static void leave(CUresult code, const std::string& text) {
    fail(code, text);
    siglongjmp(escape, 1);
}

// Runs `work`, unless something has failed. A fault in it becomes the sticky failure.
extern "C" CUresult cuda_emulator_protect(const char* what, void (*work)(void*), void* argument) {
    LOCK;
    if (sticky != OK) return sticky;
    requests++;
    static unsigned long long calls, most = setting("CUDA_EMULATOR_LOSE_AFTER_CALLS", ~0ull);
    if (strncmp(what, "kernel", 6) && calls++ >= most) {
        fail(LAUNCH_FAILED, "unspecified launch failure");
        return sticky;
    }
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &before_us[0]);
    sigaction(SIGBUS, &action, &before_us[1]);
    running = what;
    guarded = true;
    if (sigsetjmp(escape, 1) == 0) work(argument);
    guarded = false;
    sigaction(SIGSEGV, &before_us[0], nullptr);
    sigaction(SIGBUS, &before_us[1], nullptr);
    return OK;
}

// ---- Fibers.

static const size_t STACK = 1 << 17;

struct Fiber {
    void* sp;
    char* stack;
    size_t number;
};

#if !defined(__x86_64__)
#error "the fibers of this CUDA emulator are written for x86-64"
#endif
extern "C" void cuda_emulator_switch(void** save, void* load);
__asm__(
    ".text\n"
    ".type cuda_emulator_switch, @function\n"
    "cuda_emulator_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size cuda_emulator_switch, .-cuda_emulator_switch\n");

enum State { READY, AT_BARRIER, AT_SHUFFLE, DONE };

struct Thread {
    State state;
    int line;
    Fiber* fiber;
};

struct Warp {
    unsigned arrived, generation;
    int line;
    char slots[2][32][8];
};

static std::vector<Fiber*> fibers, idle;
static std::vector<Thread> threads;
static std::vector<Warp> warps;
static unsigned current;
static void* scheduler;
static CudaEmulator shared_state;
static void (*invoke)(void**);
static void** arguments;

static void hand_over() {
    cuda_emulator_switch(&threads[current].fiber->sp, scheduler);
}

static void fiber_main() {
    for (;;) {
        invoke(arguments);
        threads[current].state = DONE;
        hand_over();
    }
}

static void prepare(Fiber* fiber) {
    // Stacks begin at different places of a page: else they would fight for the same few lines of the cache.
    void** top = (void**)(fiber->stack + STACK - fiber->number * 13 * 64 % (1 << 14));
    *--top = nullptr; // where a caller's return address would be: keeps the stack aligned as after a call
    *--top = (void*)fiber_main;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber->sp = top;
}

static Fiber* take_fiber() {
    if (idle.empty()) {
        Fiber* fiber = new Fiber;
        char* memory = (char*)mmap(nullptr, STACK + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) abort();
        mprotect(memory, page(), PROT_NONE);
        fiber->stack = memory + page();
        fiber->number = fibers.size();
        prepare(fiber);
        fibers.push_back(fiber);
        idle.push_back(fiber);
    }
    Fiber* fiber = idle.back();
    idle.pop_back();
    return fiber;
}

// After a failure, fibers stand anywhere: they begin anew.
static void reset_fibers() {
    idle = fibers;
    for (Fiber* fiber : fibers) prepare(fiber);
}

static std::string where(int line) {
    return running + ", line " + std::to_string(line);
}

static void barrier(int line) {
    threads[current].state = AT_BARRIER;
    threads[current].line = line;
    hand_over();
}

static void exchange(int line, const void* own, void* other, unsigned size, unsigned lane, unsigned mask) {
    Warp& warp = warps[current / 32];
    if (mask != 0xffffffffu) leave(LAUNCH_FAILED, "a shuffle of some lanes of a warp: " + where(line));
    if (lane >= 32) leave(LAUNCH_FAILED, "a shuffle from lane " + std::to_string(lane) + ": " + where(line));
    if (warp.arrived > 0 && warp.line != line) {
        leave(LAUNCH_FAILED, "lanes of a warp are at different shuffles: " + where(line) + " and " +
                                 std::to_string(warp.line));
    }
    warp.line = line;
    unsigned generation = warp.generation;
    memcpy(warp.slots[generation % 2][current % 32], own, size);
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        warp.generation++;
        for (unsigned t = current / 32 * 32; t < current / 32 * 32 + 32; t++) threads[t].state = READY;
    } else {
        threads[current].state = AT_SHUFFLE;
        threads[current].line = line;
        hand_over();
    }
    // The next round has the other slots, and a round after that begins when all have read these.
    memcpy(other, warps[current / 32].slots[generation % 2][lane], size);
}

struct Function {
    std::string name;
    void (*invoke)(void**);
    // The most of a block: what its launch bounds say.
    unsigned threads;
    char *shared_start, *shared_stop;
    // Bytes of each argument, then 0.
    const unsigned* sizes;
};

struct Launch {
    Function* function;
    Dim3 grid, block;
    unsigned dynamic_shared;
    void** arguments;
};

static std::mt19937_64 chance;

static void run_thread(const Launch& launch, unsigned t) {
    Thread& thread = threads[t];
    if (!thread.fiber) thread.fiber = take_fiber();
    current = t;
    unsigned x = launch.block.x, y = launch.block.y;
    // One dimension is the common case, and divisions are slow.
    shared_state.thread = t < x ? Dim3{t, 0, 0} : Dim3{t % x, t / x % y, t / x / y};
    cuda_emulator_switch(&scheduler, thread.fiber->sp);
    if (thread.state == DONE) idle.push_back(thread.fiber);
}

static void run_block(const Launch& launch) {
    unsigned n = launch.block.x * launch.block.y * launch.block.z;
    threads.assign(n, Thread{READY, 0, nullptr});
    warps.assign((n + 31) / 32, Warp{});
    std::vector<unsigned> order(warps.size());
    for (unsigned i = 0; i < order.size(); i++) order[i] = i;
    for (;;) {
        // From one barrier to the next: one warp after the other, each until all its lanes wait or are done.
        std::shuffle(order.begin(), order.end(), chance);
        unsigned first = chance(), step = chance() | 1;
        for (unsigned warp : order) {
            for (bool again = true; again;) {
                again = false;
                for (unsigned i = 0; i < 32; i++) {
                    unsigned t = 32 * warp + (first + i * step) % 32;
                    if (t >= n || threads[t].state != READY) continue;
                    run_thread(launch, t);
                    again = true;
                }
            }
        }
        unsigned done = 0, waiting = 0, shuffling = 0;
        const Thread* stuck = nullptr;
        for (const Thread& thread : threads) {
            done += thread.state == DONE;
            waiting += thread.state == AT_BARRIER;
            shuffling += thread.state == AT_SHUFFLE;
            if (thread.state != DONE) stuck = &thread;
        }
        if (done == n) return;
        if (shuffling > 0) {
            for (const Thread& thread : threads) {
                if (thread.state == AT_SHUFFLE) stuck = &thread;
            }
            leave(LAUNCH_FAILED, "a shuffle that not all lanes of a warp reach: " + where(stuck->line));
        }
        if (waiting != n) {
            leave(LAUNCH_FAILED, "__syncthreads reached by " + std::to_string(waiting) + " of " + std::to_string(n) +
                                     " threads: " + where(stuck->line));
        }
        for (Thread& thread : threads) {
            if (thread.line != stuck->line) {
                leave(LAUNCH_FAILED, "threads wait at different __syncthreads: " + where(stuck->line) + " and " +
                                         std::to_string(thread.line));
            }
            thread.state = READY;
        }
    }
}

static void run_grid(void* argument) {
    const Launch& launch = *(Launch*)argument;
    static const unsigned long long seed = setting("CUDA_EMULATOR_SEED", 1);
    static unsigned long long launches;
    chance.seed(seed * 1000003 + launches++);
    std::string kernel = running;
    invoke = launch.function->invoke;
    arguments = launch.arguments;
    // Dynamic shared memory ends at a page that cannot be touched, too.
    static char* dynamic;
    if (!dynamic) {
        dynamic = (char*)mmap(nullptr, (64 << 10) + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        mprotect(dynamic + (64 << 10), page(), PROT_NONE);
    }
    char* own = dynamic + (64 << 10) - launch.dynamic_shared;
    shared_state.dynamic_shared = own;
    shared_state.barrier = barrier;
    shared_state.exchange = exchange;
    shared_state.grid_dim = launch.grid;
    shared_state.block_dim = launch.block;
    size_t blocks = (size_t)launch.grid.x * launch.grid.y * launch.grid.z;
    std::vector<size_t> order(blocks);
    for (size_t i = 0; i < blocks; i++) order[i] = i;
    std::shuffle(order.begin(), order.end(), chance);
    for (size_t b : order) {
        shared_state.block = {(unsigned)(b % launch.grid.x), (unsigned)(b / launch.grid.x % launch.grid.y),
                              (unsigned)(b / launch.grid.x / launch.grid.y)};
        running = kernel + ", block (" + std::to_string(shared_state.block.x) + ", " +
                  std::to_string(shared_state.block.y) + ", " + std::to_string(shared_state.block.z) + "), seed " +
                  std::to_string(seed);
        poison(own, launch.dynamic_shared);
        char *start = launch.function->shared_start, *stop = launch.function->shared_stop;
        if (start) poison(start, stop - start);
        run_block(launch);
    }
}

// ---- The entry points.

struct Deferred {
    std::string what;
    void (*work)(void*);
    void* argument;
};
struct Context {
    int device;
};
// What a stream was asked for while it took notes. Everything is copied, as a driver does it.
struct Node {
    // Its place among the others.
    size_t number = 0;
    std::string what = "";
    void (*work)(void*) = nullptr;
    std::vector<char> argument = {};
    // Of a kernel.
    Function* function = nullptr;
    Dim3 grid = {}, block = {};
    unsigned dynamic_shared = 0;
    std::vector<std::vector<char>> arguments = {};
};
struct Graph {
    std::vector<Node*> nodes;
};
// A graph as it was when it was made ready, with other arguments since.
struct Ready {
    Graph* graph;
    std::vector<Node> nodes;
};
struct Stream {
    Graph* notes = nullptr;
    // What was asked of it, counted; of every other stream, how much it waits for.
    unsigned long long asked = 0;
    std::map<Stream*, unsigned long long> waits_for;
    // What another library will do on it: not before something waits for it.
    std::vector<Deferred> deferred;
};
struct Event {
    Stream* stream = nullptr;
    unsigned long long asked = 0;
};
struct Module {
    void* library;
    std::map<std::string, Function> functions;
    char *shared_start, *shared_stop;
};

static Context context;
static int the_pool;
static std::map<char*, size_t> locked;
static thread_local Context* bound;
static std::map<Stream*, bool> streams;

#define READY_OR_RETURN                     \
    LOCK;                                   \
    if (sticky != OK) return sticky;        \
    if (!bound) return INVALID_CONTEXT
#define STREAM_OR_RETURN(stream) \
    if (!streams.count((Stream*)stream)) return INVALID_HANDLE
// A stream that takes notes can be asked for work, and for nothing else.
#define NO_NOTES_OR_RETURN(stream) \
    if (((Stream*)stream)->notes) return CAPTURE_UNSUPPORTED

// Does the work, or notes it with a copy of its argument.
extern "C" CUresult cuda_emulator_ask(Stream* stream, const char* what, void (*work)(void*), void* argument, size_t size) {
    LOCK;
    if (sticky != OK) return sticky;
    if (!streams.count(stream)) return INVALID_HANDLE;
    if (!stream->notes) return cuda_emulator_protect(what, work, argument);
    Node* node = new Node{stream->notes->nodes.size(), what, work, {(char*)argument, (char*)argument + size}};
    stream->notes->nodes.push_back(node);
    return OK;
}

struct Fill {
    CUdeviceptr address;
    unsigned value;
    size_t count;
};
static void run_fill(void* argument) {
    Fill& f = *(Fill*)argument;
    for (size_t i = 0; i < f.count; i++) ((unsigned*)f.address)[i] = f.value;
}

struct Copy {
    CUdeviceptr target, source;
    size_t bytes;
};
static void run_copy(void* argument) {
    Copy& c = *(Copy*)argument;
    memmove((void*)c.target, (void*)c.source, c.bytes);
}

// Does what was put off.
static void finish(Stream* stream) {
    std::vector<Deferred> jobs;
    jobs.swap(stream->deferred);
    for (Deferred& job : jobs) cuda_emulator_protect(job.what.c_str(), job.work, job.argument);
}

// Whether the memory lies in one allocation.
static bool inside(CUdeviceptr address, size_t bytes) {
    auto after = allocations.upper_bound(address);
    if (after == allocations.begin()) return false;
    auto& [start, a] = *--after;
    return address >= start && address + bytes <= start + a.bytes;
}

extern "C" {

CUresult cuInit(unsigned) {
    return setting("CUDA_EMULATOR_DEVICES", 1) == 0 ? NO_DEVICE : OK;
}

CUresult cuDriverGetVersion(int* version) {
    *version = (int)setting("CUDA_EMULATOR_VERSION", 12090);
    return OK;
}

CUresult cuDeviceGetCount(int* count) {
    *count = (int)setting("CUDA_EMULATOR_DEVICES", 1);
    return OK;
}

CUresult cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal < (int)setting("CUDA_EMULATOR_DEVICES", 1) ? OK : INVALID_DEVICE;
}

CUresult cuDeviceGetName(char* name, int len, int) {
    snprintf(name, len, "CUDA emulator");
    return OK;
}

CUresult cuDeviceGetPCIBusId(char* id, int len, int device) {
    snprintf(id, len, "0000:%02x:00.0", device);
    return OK;
}

CUresult cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 75: *value = (int)setting("CUDA_EMULATOR_CAPABILITY", 80) / 10; return OK;
        case 76: *value = (int)setting("CUDA_EMULATOR_CAPABILITY", 80) % 10; return OK;
        case 115: *value = 1; return OK; // memory pools
    }
    return INVALID_VALUE;
}

CUresult cuDevicePrimaryCtxRetain(Context** result, int) {
    LOCK;
    if (sticky != OK) return sticky;
    *result = &context;
    return OK;
}

CUresult cuDevicePrimaryCtxRelease_v2(int) {
    return OK;
}

CUresult cuCtxSetCurrent(Context* which) {
    LOCK;
    if (sticky != OK) return sticky;
    bound = which;
    return OK;
}

CUresult cuStreamCreate(Stream** stream, unsigned) {
    READY_OR_RETURN;
    *stream = new Stream;
    streams[*stream] = true;
    return OK;
}

CUresult cuStreamDestroy_v2(Stream* stream) {
    READY_OR_RETURN;
    STREAM_OR_RETURN(stream);
    streams.erase(stream);
    delete stream;
    return OK;
}

CUresult cuStreamSynchronize(Stream* stream) {
    READY_OR_RETURN;
    STREAM_OR_RETURN(stream);
    NO_NOTES_OR_RETURN(stream);
    finish(stream);
    waits++;
    for (auto& [address, a] : allocations) check_before(address, a);
    return sticky;
}

// For tests: what was counted so far.
unsigned long long cuda_emulator_waits() {
    return waits;
}

unsigned long long cuda_emulator_requests() {
    return requests;
}

unsigned long long cuda_emulator_graphs() {
    return graphs;
}

unsigned long long cuda_emulator_memory_requests() {
    return memory_requests;
}

unsigned long long cuda_emulator_growths() {
    return growths;
}

CUresult cuMemPoolCreate(int** pool, const void* properties) {
    READY_OR_RETURN;
    // Pinned memory of device 0 or another: type, handles, kind of the location, its number.
    const int* p = (const int*)properties;
    if (p[0] != 1 || p[1] != 0 || p[2] != 1 || p[3] >= (int)setting("CUDA_EMULATOR_DEVICES", 1)) return INVALID_VALUE;
    *pool = &the_pool;
    return OK;
}

CUresult cuMemPoolDestroy(int* pool) {
    READY_OR_RETURN;
    reserved = used_most = used;
    return pool == &the_pool ? OK : INVALID_VALUE;
}

CUresult cuMemPoolSetAttribute(int* pool, int attribute, void*) {
    READY_OR_RETURN;
    return pool == &the_pool && attribute == 4 ? OK : INVALID_VALUE;
}

CUresult cuMemPoolGetAttribute(int* pool, int attribute, unsigned long long* value) {
    READY_OR_RETURN;
    if (pool != &the_pool) return INVALID_VALUE;
    switch (attribute) {
        case 5: *value = reserved; return OK;
        case 7: *value = used; return OK;
        case 8: *value = used_most; return OK;
    }
    return INVALID_VALUE;
}

CUresult cuMemAllocFromPoolAsync(CUdeviceptr* result, size_t bytes, int* pool, Stream* stream) {
    READY_OR_RETURN;
    STREAM_OR_RETURN(stream);
    NO_NOTES_OR_RETURN(stream);
    if (bytes == 0 || pool != &the_pool) return INVALID_VALUE;
    memory_requests++;
    if (used + bytes > setting("CUDA_EMULATOR_MEMORY", 1ull << 31)) return OUT_OF_MEMORY;
    size_t pages = (bytes + page() - 1) / page() * page();
    Allocation a;
    a.bytes = bytes;
    a.mapped = pages + 2 * page();
    a.mapping = (char*)mmap(nullptr, a.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (a.mapping == MAP_FAILED) return OUT_OF_MEMORY;
    a.pages = a.mapping + page();
    a.pages_end = a.pages + pages;
    mprotect(a.pages, pages, PROT_READ | PROT_WRITE);
    poison(a.pages, pages);
    *result = (CUdeviceptr)(a.pages_end - (bytes + 3) / 4 * 4);
    allocations[*result] = a;
    used += bytes;
    if (used > used_most) used_most = used;
    if (used > reserved) {
        reserved = used;
        growths++;
    }
    return OK;
}

// Whoever touches it from now on is noticed, also where a GPU would not have come to it yet.
CUresult cuMemFreeAsync(CUdeviceptr address, Stream* stream) {
    READY_OR_RETURN;
    STREAM_OR_RETURN(stream);
    NO_NOTES_OR_RETURN(stream);
    memory_requests++;
    auto found = allocations.find(address);
    if (found == allocations.end()) return INVALID_VALUE;
    check_before(address, found->second);
    munmap(found->second.mapping, found->second.mapped);
    used -= found->second.bytes;
    allocations.erase(found);
    return sticky;
}

CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
    READY_OR_RETURN;
    *total = setting("CUDA_EMULATOR_MEMORY", 1ull << 31);
    *free = *total - reserved;
    return OK;
}

// Page-locked memory of the host.
CUresult cuMemHostAlloc(void** result, size_t bytes, unsigned) {
    READY_OR_RETURN;
    *result = malloc(bytes);
    locked[(char*)*result] = bytes;
    return *result ? OK : OUT_OF_MEMORY;
}

CUresult cuMemFreeHost(void* memory) {
    READY_OR_RETURN;
    if (!locked.erase((char*)memory)) return INVALID_VALUE;
    free(memory);
    return OK;
}

CUresult cuMemsetD32Async(CUdeviceptr address, unsigned value, size_t count, Stream* stream) {
    READY_OR_RETURN;
    STREAM_OR_RETURN(stream);
    if (!inside(address, 4 * count)) return INVALID_VALUE;
    Fill fill = {address, value, count};
    stream->asked++;
    return cuda_emulator_ask(stream, "kernel that fills", run_fill, &fill, sizeof fill);
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void* source, size_t bytes, Stream* stream) {
    READY_OR_RETURN;
    STREAM_OR_RETURN(stream);
    NO_NOTES_OR_RETURN(stream);
    if (!inside(target, bytes)) return INVALID_VALUE;
    // A driver may have to wait before it can take a copy of memory that is not page-locked.
    auto after = locked.upper_bound((char*)source);
    bool is_locked = after != locked.begin() && (char*)source + bytes <= std::prev(after)->first + std::prev(after)->second;
    if (!is_locked) waits++;
    memcpy((void*)target, source, bytes);
    requests++;
    stream->asked++;
    return OK;
}

CUresult cuMemcpyDtoHAsync_v2(void* target, CUdeviceptr source, size_t bytes, Stream* stream) {
    READY_OR_RETURN;
    STREAM_OR_RETURN(stream);
    NO_NOTES_OR_RETURN(stream);
    if (!inside(source, bytes)) return INVALID_VALUE;
    memcpy(target, (void*)source, bytes);
    requests++;
    return OK;
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t bytes, Stream* stream) {
    READY_OR_RETURN;
    STREAM_OR_RETURN(stream);
    if (!inside(source, bytes) || !inside(target, bytes)) return INVALID_VALUE;
    Copy copy = {target, source, bytes};
    stream->asked++;
    return cuda_emulator_ask(stream, "kernel that copies", run_copy, &copy, sizeof copy);
}

// An image is what nvrtc.cpp makes: a mark, its size, a shared library.
CUresult cuModuleLoadData(Module** result, const void* image) {
    READY_OR_RETURN;
    if (memcmp(image, "CUDAEMUL", 8)) return INVALID_IMAGE;
    size_t size;
    memcpy(&size, (const char*)image + 8, sizeof size);
    char path[] = "/tmp/cuda_emulator_XXXXXX";
    int file = mkstemp(path);
    if (file < 0 || write(file, (const char*)image + 16, size) != (ssize_t)size) return INVALID_IMAGE;
    close(file);
    Module* module = new Module;
    module->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    unlink(path);
    if (!module->library) {
        fprintf(stderr, "cuda emulator: %s\n", dlerror());
        return INVALID_IMAGE;
    }
    ((void (*)(CudaEmulator*))dlsym(module->library, "cuda_emulator_attach"))(&shared_state);
    auto shared = (void (*)(char**, char**))dlsym(module->library, "cuda_emulator_shared");
    shared(&module->shared_start, &module->shared_stop);
    *result = module;
    return OK;
}

CUresult cuModuleGetFunction(Function** result, Module* module, const char* name) {
    READY_OR_RETURN;
    void* symbol = dlsym(module->library, (std::string("cuda_emulator_kernel_") + name).c_str());
    auto threads = (unsigned*)dlsym(module->library, (std::string("cuda_emulator_threads_") + name).c_str());
    auto sizes = (const unsigned* (*)())dlsym(module->library, (std::string("cuda_emulator_sizes_of_") + name).c_str());
    if (!symbol || !threads || !sizes) return NOT_FOUND;
    module->functions[name] = {name, (void (*)(void**))symbol, *threads, module->shared_start, module->shared_stop, sizes()};
    *result = &module->functions[name];
    return OK;
}

// Whether a GPU would take it.
static CUresult check_launch(Function* function, Dim3 grid, Dim3 b, unsigned dynamic_shared) {
    size_t block = (size_t)b.x * b.y * b.z, shared = dynamic_shared + (function->shared_stop - function->shared_start);
    bool fits = grid.x > 0 && grid.y > 0 && grid.z > 0 && block > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 &&
                grid.z <= 65535 && block <= 1024 && b.z <= 64 && shared <= 48 << 10;
    if (block > function->threads) {
        refusal = "kernel " + function->name + " is declared for blocks of up to " + std::to_string(function->threads) +
                  " threads, not of " + std::to_string(block);
        return INVALID_VALUE;
    }
    return fits ? OK : INVALID_VALUE;
}

static void run_launch(const Launch& launch) {
    static unsigned long long launches, most = setting("CUDA_EMULATOR_LOSE_AFTER", ~0ull);
    if (launches++ >= most) {
        fail(LAUNCH_FAILED, "unspecified launch failure");
        return;
    }
    cuda_emulator_protect(("kernel " + launch.function->name).c_str(), run_grid, (void*)&launch);
    if (sticky != OK) reset_fibers();
}

static std::vector<std::vector<char>> copied(const Function* function, void** args) {
    std::vector<std::vector<char>> copies;
    for (size_t i = 0; function->sizes[i]; i++) {
        copies.emplace_back((char*)args[i], (char*)args[i] + function->sizes[i]);
    }
    return copies;
}

CUresult cuLaunchKernel(
    Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned dynamic_shared, Stream* stream, void** args, void** extra
) {
    READY_OR_RETURN;
    STREAM_OR_RETURN(stream);
    Launch launch = {function, {gx, gy, gz}, {bx, by, bz}, dynamic_shared, args};
    CUresult refused = check_launch(function, launch.grid, launch.block, dynamic_shared);
    if (refused != OK) return refused;
    if (!args || extra) return INVALID_VALUE;
    stream->asked++;
    if (!stream->notes) {
        run_launch(launch);
        return OK;
    }
    Node* node = new Node{stream->notes->nodes.size()};
    node->function = function;
    node->grid = launch.grid;
    node->block = launch.block;
    node->dynamic_shared = dynamic_shared;
    node->arguments = copied(function, args);
    stream->notes->nodes.push_back(node);
    return OK;
}

// ---- Graphs: a stream takes notes, which are done as a whole afterwards.

CUresult cuStreamBeginCapture_v2(Stream* stream, int mode) {
    READY_OR_RETURN;
    STREAM_OR_RETURN(stream);
    NO_NOTES_OR_RETURN(stream);
    if (mode != 1) return INVALID_VALUE;
    stream->notes = new Graph;
    return OK;
}

CUresult cuStreamGetCaptureInfo_v3(
    Stream* stream, int* status, unsigned long long*, Graph**, Node*** last, const void** edges, size_t* count
) {
    READY_OR_RETURN;
    STREAM_OR_RETURN(stream);
    *status = stream->notes ? 1 : 0;
    *count = stream->notes && !stream->notes->nodes.empty();
    if (*count) *last = &stream->notes->nodes.back();
    if (edges) *edges = nullptr;
    return OK;
}

CUresult cuStreamEndCapture(Stream* stream, Graph** graph) {
    READY_OR_RETURN;
    STREAM_OR_RETURN(stream);
    *graph = stream->notes;
    stream->notes = nullptr;
    if (*graph && setting("CUDA_EMULATOR_NO_GRAPHS", 0)) {
        *graph = nullptr;
        return CAPTURE_UNSUPPORTED;
    }
    return *graph ? OK : INVALID_VALUE;
}

CUresult cuGraphInstantiateWithFlags(Ready** ready, Graph* graph, unsigned long long flags) {
    READY_OR_RETURN;
    if (!graph || flags) return INVALID_VALUE;
    *ready = new Ready{graph, {}};
    for (Node* node : graph->nodes) (*ready)->nodes.push_back(*node);
    return OK;
}

// CUDA_KERNEL_NODE_PARAMS, version 2.
struct KernelNode {
    Function* function;
    unsigned grid[3], block[3], dynamic_shared;
    void **args, **extra;
    void *kernel, *context;
};

CUresult cuGraphExecKernelNodeSetParams_v2(Ready* ready, Node* node, const KernelNode* p) {
    READY_OR_RETURN;
    requests++;
    bool known = node->number < ready->graph->nodes.size() && ready->graph->nodes[node->number] == node;
    if (!known || node->function != p->function || !p->args || p->extra) return INVALID_VALUE;
    Dim3 grid = {p->grid[0], p->grid[1], p->grid[2]}, block = {p->block[0], p->block[1], p->block[2]};
    CUresult refused = check_launch(p->function, grid, block, p->dynamic_shared);
    if (refused != OK) return refused;
    Node& own = ready->nodes[node->number];
    own.grid = grid;
    own.block = block;
    own.dynamic_shared = p->dynamic_shared;
    own.arguments = copied(p->function, p->args);
    return OK;
}

CUresult cuGraphLaunch(Ready* ready, Stream* stream) {
    READY_OR_RETURN;
    STREAM_OR_RETURN(stream);
    NO_NOTES_OR_RETURN(stream);
    unsigned long long before = requests;
    for (Node& node : ready->nodes) {
        if (!node.function) {
            cuda_emulator_protect(node.what.c_str(), node.work, node.argument.data());
            continue;
        }
        std::vector<void*> args;
        for (auto& argument : node.arguments) args.push_back(argument.data());
        run_launch({node.function, node.grid, node.block, node.dynamic_shared, args.data()});
    }
    // However much it is, it was asked for once.
    requests = before + 1;
    graphs++;
    stream->asked++;
    return OK;
}

CUresult cuGraphExecDestroy(Ready* ready) {
    READY_OR_RETURN;
    delete ready;
    return OK;
}

CUresult cuGraphDestroy(Graph* graph) {
    READY_OR_RETURN;
    for (Node* node : graph->nodes) delete node;
    delete graph;
    return OK;
}

CUresult cuEventCreate(Event** event, unsigned) {
    READY_OR_RETURN;
    *event = new Event;
    return OK;
}

CUresult cuEventRecord(Event* event, Stream* stream) {
    READY_OR_RETURN;
    STREAM_OR_RETURN(stream);
    *event = {stream, stream->asked};
    return OK;
}

CUresult cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    READY_OR_RETURN;
    STREAM_OR_RETURN(stream);
    STREAM_OR_RETURN(event->stream);
    finish(event->stream);
    auto& known = stream->waits_for[event->stream];
    known = std::max(known, event->asked);
    return sticky;
}

// The host waits.
CUresult cuEventSynchronize(Event* event) {
    READY_OR_RETURN;
    STREAM_OR_RETURN(event->stream);
    finish(event->stream);
    waits++;
    return sticky;
}

CUresult cuEventDestroy_v2(Event* event) {
    READY_OR_RETURN;
    delete event;
    return OK;
}

// For nccl.cpp. What it reads must be there: the stream has to wait for all that the others were asked for.
int cuda_emulator_defer(Stream* stream, const char* what, void (*work)(void*), void* argument) {
    LOCK;
    if (sticky != OK || !streams.count(stream)) return 0;
    for (auto& [other, _] : streams) {
        if (other != stream && stream->waits_for[other] < other->asked) return 0;
    }
    stream->asked++;
    stream->deferred.push_back({what, work, argument});
    return 1;
}

CUresult cuGetErrorName(CUresult error, const char** text) {
    switch (error) {
        case INVALID_VALUE: *text = "CUDA_ERROR_INVALID_VALUE"; break;
        case OUT_OF_MEMORY: *text = "CUDA_ERROR_OUT_OF_MEMORY"; break;
        case NO_DEVICE: *text = "CUDA_ERROR_NO_DEVICE"; break;
        case INVALID_IMAGE: *text = "CUDA_ERROR_INVALID_IMAGE"; break;
        case INVALID_CONTEXT: *text = "CUDA_ERROR_INVALID_CONTEXT"; break;
        case CAPTURE_UNSUPPORTED: *text = "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"; break;
        case INVALID_HANDLE: *text = "CUDA_ERROR_INVALID_HANDLE"; break;
        case NOT_FOUND: *text = "CUDA_ERROR_NOT_FOUND"; break;
        case ILLEGAL_ADDRESS: *text = "CUDA_ERROR_ILLEGAL_ADDRESS"; break;
        case LAUNCH_FAILED: *text = "CUDA_ERROR_LAUNCH_FAILED"; break;
        default: return INVALID_VALUE;
    }
    return OK;
}

// The double says more than a driver does: what happened where.
CUresult cuGetErrorString(CUresult error, const char** text) {
    LOCK;
    *text = error == sticky && error != OK ? sticky_text.c_str() : refusal.c_str();
    return OK;
}
}
