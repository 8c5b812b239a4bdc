// Compiles shaders by metalc.py and loads them.

#include <dlfcn.h>
#include <spawn.h>
#include <sys/wait.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "library.h"
#include "machine.h"
#include "runtime.h"

extern char** environ;

namespace metal_emulator {
namespace {

class LoadedFunction : public Function {
 public:
  LoadedFunction(const Exports& library, const Kernel& kernel,
                 const std::map<int, std::vector<char>>& constants)
      : library_(library), kernel_(kernel), constants_(constants) {}

  std::string Run(const Dispatch& dispatch) override {
    return RunGrid(library_, kernel_, constants_, dispatch);
  }
  size_t static_threadgroup_bytes() const override {
    size_t total = 0;
    for (int i = 0; i < kernel_.shared_count; ++i) total += kernel_.shared[i].size;
    return total;
  }

 private:
  const Exports& library_;
  const Kernel& kernel_;
  const std::map<int, std::vector<char>> constants_;
};

class LoadedLibrary : public Library {
 public:
  explicit LoadedLibrary(const Exports& exports) : exports_(exports) {}

  std::shared_ptr<Function> MakeFunction(const std::string& name,
                                         const std::map<int, std::vector<char>>& constants,
                                         std::string* error) override {
    std::map<int, size_t> sizes;
    for (int i = 0; i < exports_.constant_count; ++i) {
      const Constant& constant = exports_.constants[i];
      sizes[constant.index] = constant.size;
      if (constants.count(constant.index) == 0) {
        *error = "the function constant " + std::string(constant.name) + " has no value";
        return nullptr;
      }
    }
    for (const auto& [index, value] : constants) {
      const auto known = sizes.find(index);
      if (known == sizes.end()) {
        *error = "there is no function constant " + std::to_string(index);
        return nullptr;
      }
      if (known->second != value.size()) {
        *error = "the function constant " + std::to_string(index) + " has " +
                 std::to_string(known->second) + " bytes, not " + std::to_string(value.size());
        return nullptr;
      }
    }
    for (int i = 0; i < exports_.kernel_count; ++i) {
      if (name == exports_.kernels[i].name) {
        return std::make_shared<LoadedFunction>(exports_, exports_.kernels[i], constants);
      }
    }
    *error = "there is no kernel " + name;
    return nullptr;
  }

 private:
  const Exports& exports_;  // libraries are never unloaded
};

// A file without a name.
class TemporaryFile {
 public:
  TemporaryFile() : file_(std::tmpfile()) {}
  ~TemporaryFile() {
    if (file_ != nullptr) std::fclose(file_);
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  explicit operator bool() const { return file_ != nullptr; }
  int descriptor() const { return fileno(file_); }
  void Write(const std::string& text) {
    std::fwrite(text.data(), 1, text.size(), file_);
    std::rewind(file_);
  }
  std::string Read() {
    std::rewind(file_);
    std::string text;
    for (int c; (c = std::fgetc(file_)) != EOF;) text += static_cast<char>(c);
    while (!text.empty() && text.back() == '\n') text.pop_back();
    return text;
  }

 private:
  std::FILE* file_;
};

// Runs a program; what it prints is `output`, or `error` where it fails.
bool RunProgram(std::vector<std::string> command, const std::string& input, std::string* output,
                std::string* error) {
  TemporaryFile in, out, err;
  if (!in || !out || !err) {
    *error = "no temporary file can be made";
    return false;
  }
  in.Write(input);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, in.descriptor(), 0);
  posix_spawn_file_actions_adddup2(&actions, out.descriptor(), 1);
  posix_spawn_file_actions_adddup2(&actions, err.descriptor(), 2);
  std::vector<char*> arguments;
  for (std::string& each : command) arguments.push_back(each.data());
  arguments.push_back(nullptr);
  pid_t child;
  const int problem =
      posix_spawnp(&child, arguments[0], &actions, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (problem != 0) {
    *error = command[0] + ": " + std::strerror(problem);
    return false;
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  *output = out.Read();
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return true;
  *error = err.Read();
  if (error->empty()) *error = command[0] + " failed";
  return false;
}

// That of this file and of metalc.py.
std::string Folder() {
  const std::string file = __FILE__;
  const size_t slash = file.rfind('/');
  return slash == std::string::npos ? "." : file.substr(0, slash);
}

}  // namespace

std::shared_ptr<Library> Compile(const std::string& source,
                                 const std::map<std::string, std::string>& macros,
                                 std::string* error) {
  const char* python = std::getenv("METAL_EMULATOR_PYTHON");
  std::vector<std::string> command = {python != nullptr ? python : "python3",
                                      Folder() + "/metalc.py"};
  for (const auto& [name, value] : macros) command.push_back("-D" + name + "=" + value);
  command.push_back("-");
  std::string path;
  if (!RunProgram(command, source, &path, error)) return nullptr;
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    *error = dlerror();
    return nullptr;
  }
  auto* exports = static_cast<const Exports*>(dlsym(handle, "metal_emulator_exports"));
  if (exports == nullptr) {
    *error = path + " is not a shader library";
    return nullptr;
  }
  return std::make_shared<LoadedLibrary>(*exports);
}

}  // namespace metal_emulator
