// Tests the runtime and metalc.py by small shaders, right ones and wrong ones.
//
//   runtime_test [NAME]...    runs the tests of these names, or all; exits with 0 if all is well
//   runtime_test --list       prints their names

#include "runtime_test.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace metal_emulator {
namespace {

using Tests = std::map<std::string, void (*)()>;

Tests& AllTests() {
  static Tests* const tests = new Tests;
  return *tests;
}

int failures = 0;

}  // namespace

bool RegisterTest(const char* name, void (*run)()) { return AllTests().emplace(name, run).second; }

void Check(bool holds, const std::string& what) {
  if (holds) return;
  failures += 1;
  std::printf("  FAILED: %s\n", what.c_str());
}

void CheckContains(const std::string& text, const std::string& part) {
  Check(text.find(part) != std::string::npos, "\"" + text + "\" has no \"" + part + "\"");
}

std::shared_ptr<Function> Make(const std::string& body, const std::string& name,
                               const std::map<std::string, std::string>& macros,
                               const std::map<int, std::vector<char>>& constants) {
  std::string error;
  auto library =
      Compile("#include <metal_stdlib>\nusing namespace metal;\n" + body, macros, &error);
  if (library == nullptr) {
    Check(false, error);
    std::exit(1);
  }
  auto function = library->MakeFunction(name, constants, &error);
  Check(function != nullptr, error);
  return function;
}

Dispatch Grid(uint32_t groups, uint32_t threads, std::vector<Binding> buffers) {
  Dispatch dispatch;
  dispatch.groups[0] = groups;
  dispatch.threads[0] = threads;
  for (size_t i = 0; i < buffers.size(); ++i) dispatch.buffers[i] = std::move(buffers[i]);
  return dispatch;
}

std::vector<float> Iota(size_t count) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = static_cast<float>(i);
  return values;
}

}  // namespace metal_emulator

int main(int argc, char** argv) {
  using metal_emulator::AllTests;
  using metal_emulator::failures;
  std::setbuf(stdout, nullptr);
  if (argc == 2 && std::strcmp(argv[1], "--list") == 0) {
    for (const auto& each : AllTests()) std::printf("%s\n", each.first.c_str());
    return 0;
  }
  std::vector<std::string> names(argv + 1, argv + argc);
  if (names.empty()) {
    for (const auto& each : AllTests()) names.push_back(each.first);
  }
  for (const std::string& name : names) {
    const auto test = AllTests().find(name);
    if (test == AllTests().end()) {
      std::printf("there is no test %s\n", name.c_str());
      return 2;
    }
    std::printf("%s\n", name.c_str());
    metal_emulator_seed(1);
    test->second();
  }
  if (failures == 0) {
    std::printf("all well\n");
  } else {
    std::printf("%d failures\n", failures);
  }
  return failures == 0 ? 0 : 1;
}
