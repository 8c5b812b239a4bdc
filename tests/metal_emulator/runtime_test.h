// What the tests of the runtime have in common: small shaders, right ones and wrong ones, are
// compiled and run.
#ifndef METAL_EMULATOR_RUNTIME_TEST_H_
#define METAL_EMULATOR_RUNTIME_TEST_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "runtime.h"

namespace metal_emulator {

// TEST(Name) { ... } is run by the main() of runtime_test.cc.
#define TEST(name)                                       \
  static void Test##name();                              \
  [[maybe_unused]] static const bool name##_registered = \
      ::metal_emulator::RegisterTest(#name, Test##name); \
  static void Test##name()
bool RegisterTest(const char* name, void (*run)());

void Check(bool holds, const std::string& what);
void CheckContains(const std::string& text, const std::string& part);

// A kernel of the metal_stdlib.
std::shared_ptr<Function> Make(const std::string& body, const std::string& name = "k",
                               const std::map<std::string, std::string>& macros = {},
                               const std::map<int, std::vector<char>>& constants = {});

template <class T>
Binding Bind(const char* name, std::vector<T>& values) {
  return {name, reinterpret_cast<char*>(values.data()), values.size() * sizeof(T), {}};
}

template <class T>
Binding Bytes(T value) {
  const char* begin = reinterpret_cast<const char*>(&value);
  return {"bytes", nullptr, sizeof value, std::vector<char>(begin, begin + sizeof value)};
}

Dispatch Grid(uint32_t groups, uint32_t threads, std::vector<Binding> buffers);

std::vector<float> Iota(size_t count);

}  // namespace metal_emulator

#endif  // METAL_EMULATOR_RUNTIME_TEST_H_
