// A stand-in for libnvrtc.so.12: compiles kernels for the host, with g++ and device.h, into what driver.cpp loads.
//
// What was compiled is kept beside the library, by the hash of all that went in. The environment:
//
//   CUDA_EMULATOR_MUTATE_FILE, CUDA_EMULATOR_MUTATE_FROM, CUDA_EMULATOR_MUTATE_TO
//                            breaks a kernel on purpose: in the program of this name, FROM (which must occur once)
//                            becomes TO

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fstream>
#include <functional>
#include <regex>
#include <sstream>
#include <string>
#include <unistd.h>
#include <vector>

struct Program {
    std::string source, name, log, code;
};

enum Result { OK = 0, INVALID_INPUT = 3, INVALID_OPTION = 5, COMPILATION = 6 };

static const int ARCHITECTURES[] = {75, 80, 86, 89, 90, 100, 120};

static std::string read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

static std::string setting(const char* name) {
    const char* text = getenv(name);
    return text ? text : "";
}

// Breaks the source, if that is asked for. False if it cannot be done.
static bool mutate(Program& program) {
    if (setting("CUDA_EMULATOR_MUTATE_FILE") != program.name) return true;
    std::string from = setting("CUDA_EMULATOR_MUTATE_FROM");
    size_t at = program.source.find(from);
    if (from.empty() || at == std::string::npos || program.source.find(from, at + 1) != std::string::npos) {
        program.log = "the text to mutate does not occur exactly once: " + from;
        return false;
    }
    program.source.replace(at, from.size(), setting("CUDA_EMULATOR_MUTATE_TO"));
    return true;
}

// The folder of this library.
static std::string folder() {
    Dl_info info;
    dladdr((void*)folder, &info);
    std::string path = info.dli_fname;
    return path.substr(0, path.rfind('/'));
}

static Result compile(Program& program) {
    if (!mutate(program)) return COMPILATION;
    std::string header = CUDA_EMULATOR_HEADER;
    size_t hash = std::hash<std::string>()(program.source + read(header));
    std::string cache = folder();
    char key[32];
    snprintf(key, sizeof key, "%016zx", hash);
    std::string kept = cache + "/" + program.name + "-" + key + ".so";
    program.code = read(kept);
    if (program.code.empty()) {
        std::string own = cache + "/" + program.name + "-" + key + "-" + std::to_string(getpid());
        std::ofstream(own + ".cu") << program.source;
        std::string compiler = "g++ -std=c++17 -x c++ ";
        std::string log = " 2>> '" + own + ".log'";
        // First the macros, so that all kernels have their names.
        if (system((compiler + "-E '" + own + ".cu' -o '" + own + ".ii'" + log).c_str())) {
            program.log = read(own + ".log");
            return COMPILATION;
        }
        std::string text = read(own + ".ii");
        text = std::regex_replace(
            text, std::regex("extern __shared__ (\\w+) (\\w+)\\[\\];"), "$1* $2 = ($1*)cuda_emulator->dynamic_shared;"
        );
        // Launch bounds are numbers by now; device.h, which hides them from g++, comes later.
        std::regex kernel("__global__ void (?:__launch_bounds__\\((\\d+)(?:, \\d+)?\\) )?(\\w+)\\(");
        std::string entries;
        for (std::sregex_iterator i(text.begin(), text.end(), kernel), end; i != end; ++i) {
            std::string threads = (*i)[1].matched ? (*i)[1].str() : "1024", name = (*i)[2];
            entries += "extern \"C\" { unsigned cuda_emulator_threads_" + name + " = " + threads +
                       "; void cuda_emulator_kernel_" + name + "(void** args) { cuda_emulator_invoke(" + name +
                       ", args); } const unsigned* cuda_emulator_sizes_of_" + name + "() { return cuda_emulator_sizes(" +
                       name + "); } }\n";
        }
        std::ofstream(own + ".ii") << text << "\n" << entries;
        std::string options = "-O2 -fPIC -shared -fno-gnu-unique -ffp-contract=off -w -include '" + header + "' ";
        bool failed = system((compiler + options + "'" + own + ".ii' -o '" + own + ".so'" + log).c_str());
        program.log = read(own + ".log");
        for (const char* end : {".cu", ".ii", ".log"}) unlink((own + end).c_str());
        if (failed) return COMPILATION;
        program.code = read(own + ".so");
        rename((own + ".so").c_str(), kept.c_str());
    }
    size_t size = program.code.size();
    program.code = "CUDAEMUL" + std::string((char*)&size, sizeof size) + program.code;
    return OK;
}

extern "C" {

Result nvrtcVersion(int* major, int* minor) {
    *major = 12;
    *minor = 9;
    return OK;
}

Result nvrtcGetNumSupportedArchs(int* count) {
    *count = sizeof ARCHITECTURES / sizeof *ARCHITECTURES;
    return OK;
}

Result nvrtcGetSupportedArchs(int* list) {
    memcpy(list, ARCHITECTURES, sizeof ARCHITECTURES);
    return OK;
}

Result nvrtcCreateProgram(Program** program, const char* source, const char* name, int headers, const char**, const char**) {
    if (headers) return INVALID_INPUT;
    *program = new Program{source, name, "", ""};
    return OK;
}

Result nvrtcDestroyProgram(Program** program) {
    delete *program;
    *program = nullptr;
    return OK;
}

Result nvrtcCompileProgram(Program* program, int count, const char** options) {
    bool architecture = false;
    for (int i = 0; i < count; i++) {
        std::string option = options[i];
        if (std::regex_match(option, std::regex("--gpu-architecture=(sm|compute)_\\d+"))) architecture = true;
        else if (option != "--std=c++17") return INVALID_OPTION;
    }
    return architecture ? compile(*program) : INVALID_OPTION;
}

Result nvrtcGetProgramLogSize(Program* program, size_t* size) {
    *size = program->log.size() + 1;
    return OK;
}

Result nvrtcGetProgramLog(Program* program, char* log) {
    memcpy(log, program->log.c_str(), program->log.size() + 1);
    return OK;
}

Result nvrtcGetCUBINSize(Program* program, size_t* size) {
    *size = program->code.size();
    return OK;
}

Result nvrtcGetCUBIN(Program* program, char* code) {
    memcpy(code, program->code.data(), program->code.size());
    return OK;
}

Result nvrtcGetPTXSize(Program* program, size_t* size) {
    return nvrtcGetCUBINSize(program, size);
}

Result nvrtcGetPTX(Program* program, char* code) {
    return nvrtcGetCUBIN(program, code);
}
}
