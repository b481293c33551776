// A stand-in for libnccl.so.2: sums and copies between the processes of one machine, through shared memory and in the order
// of the ranks. As on a GPU nothing has happened when a call returns: driver.cpp does it when something waits for the stream.
//
//   CUDA_EMULATOR_NCCL_FAIL_AFTER  the network fails after this many calls (never)

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fcntl.h>
#include <new>
#include <sys/mman.h>
#include <unistd.h>

enum Result { OK = 0, UNHANDLED_CUDA_ERROR = 1, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6 };

static const size_t SLOT = 1 << 16; // elements of a process that lie in shared memory at a time
static const int MOST = 8;

struct Shared {
    std::atomic<int> arrived, turn;
    float slots[MOST][SLOT];
};

struct Id {
    char name[128];
};

struct Comm {
    int rank, size;
    Shared* shared;
};

// driver.cpp's: does `work` when something waits for the stream; false if the stream does not wait for all kernels so far.
typedef int (*Defer)(void* stream, const char* what, void (*work)(void*), void* argument);

static Defer defer() {
    void* driver = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD);
    return driver ? (Defer)dlsym(driver, "cuda_emulator_defer") : nullptr;
}

// Returns when all processes have come here.
static void meet(Comm* comm) {
    Shared& s = *comm->shared;
    int turn = s.turn.load();
    if (s.arrived.fetch_add(1) + 1 == comm->size) {
        s.arrived = 0;
        s.turn++;
        return;
    }
    for (int i = 0; s.turn.load() == turn; i++) usleep(i < 1000 ? 20 : 1000);
}

struct Job {
    Comm* comm;
    const float* from;
    float* to;
    size_t count;
    int root; // -1: a sum
};

static void run(void* argument) {
    Job* job = (Job*)argument;
    Comm* comm = job->comm;
    for (size_t first = 0; first < job->count; first += SLOT) {
        size_t n = job->count - first < SLOT ? job->count - first : SLOT;
        memcpy(comm->shared->slots[comm->rank], job->from + first, n * sizeof(float));
        meet(comm);
        for (size_t i = 0; i < n; i++) {
            float value = comm->shared->slots[job->root < 0 ? 0 : job->root][i];
            if (job->root < 0) {
                for (int rank = 1; rank < comm->size; rank++) value += comm->shared->slots[rank][i];
            }
            job->to[first + i] = value;
        }
        meet(comm);
    }
    delete job;
}

static int groups;

static Result begin(const char* what, const void* from, void* to, size_t count, int type, int root, Comm* comm, void* stream) {
    static int calls, most = getenv("CUDA_EMULATOR_NCCL_FAIL_AFTER") ? atoi(getenv("CUDA_EMULATOR_NCCL_FAIL_AFTER")) : -1;
    if (most >= 0 && calls++ >= most) return REMOTE_ERROR;
    if (!comm || type != 7 || root >= comm->size) return INVALID_ARGUMENT;
    Job* job = new Job{comm, (const float*)from, (float*)to, count, root};
    return defer()(stream, what, run, job) ? OK : INVALID_USAGE;
}

extern "C" {

Result ncclGetUniqueId(Id* id) {
    static int made;
    memset(id, 0, sizeof *id);
    snprintf(id->name, sizeof id->name, "/cuda_emulator_nccl_%d_%d", getpid(), made++);
    int file = shm_open(id->name, O_CREAT | O_EXCL | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, sizeof(Shared))) return SYSTEM_ERROR;
    void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) return SYSTEM_ERROR;
    Shared* shared = new (memory) Shared;
    shared->arrived = shared->turn = 0;
    munmap(memory, sizeof(Shared));
    return OK;
}

Result ncclCommInitRank(Comm** comm, int size, Id id, int rank) {
    if (!defer()) return UNHANDLED_CUDA_ERROR;
    if (size < 1 || size > MOST || rank < 0 || rank >= size) return INVALID_ARGUMENT;
    int file = shm_open(id.name, O_RDWR, 0600);
    if (file < 0) return SYSTEM_ERROR;
    void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) return SYSTEM_ERROR;
    *comm = new Comm{rank, size, (Shared*)memory};
    meet(*comm);
    if (rank == 0) shm_unlink(id.name);
    return OK;
}

Result ncclCommAbort(Comm* comm) {
    munmap(comm->shared, sizeof(Shared));
    delete comm;
    return OK;
}

Result ncclGroupStart() {
    groups++;
    return OK;
}

Result ncclGroupEnd() {
    return --groups < 0 ? INVALID_USAGE : OK;
}

Result ncclAllReduce(const void* from, void* to, size_t count, int type, int operation, Comm* comm, void* stream) {
    if (operation != 0) return INVALID_ARGUMENT;
    return begin("ncclAllReduce", from, to, count, type, -1, comm, stream);
}

Result ncclBroadcast(const void* from, void* to, size_t count, int type, int root, Comm* comm, void* stream) {
    if (root < 0) return INVALID_ARGUMENT;
    return begin("ncclBroadcast", from, to, count, type, root, comm, stream);
}

const char* ncclGetErrorString(Result result) {
    switch (result) {
        case SYSTEM_ERROR: return "unhandled system error";
        case INVALID_USAGE: return "invalid usage: the stream does not wait for the kernels before";
        case REMOTE_ERROR: return "remote process exited or there was a network error";
        default: return "refused by the CUDA emulator";
    }
}
}
