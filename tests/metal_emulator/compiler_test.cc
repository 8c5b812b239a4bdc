// Function constants, and what is said of shaders that do not compile.

#include "runtime_test.h"

namespace metal_emulator {
namespace {

TEST(Constants) {
  const char source[] = R"(
constant bool flag [[function_constant(0)]];
constant uint amount [[ function_constant(3) ]];
constant constexpr uint kDouble = 2;
kernel void k(device uint* out [[buffer(0)]]) { out[0] = (flag ? 1000 : 0) + kDouble * amount; }
)";
  const auto bytes = [](uint32_t value) {
    const char* begin = reinterpret_cast<const char*>(&value);
    return std::vector<char>(begin, begin + 4);
  };
  const auto one = Make(source, "k", {}, {{0, {1}}, {3, bytes(21)}});
  const auto two = Make(source, "k", {}, {{0, {0}}, {3, bytes(7)}});
  std::vector<uint32_t> out(1);
  const Dispatch dispatch = Grid(1, 1, {Bind("out", out)});
  for (int i = 0; i < 2; ++i) {
    Check(one->Run(dispatch).empty() && out[0] == 1042, "one set of constants");
    Check(two->Run(dispatch).empty() && out[0] == 14, "another");
  }
  std::string error;
  const auto library = Compile(std::string("#include <metal_stdlib>\n") + source, {}, &error);
  Check(!library->MakeFunction("k", {{0, {1}}}, &error), "a value is missing");
  CheckContains(error, "amount has no value");
  Check(!library->MakeFunction("k", {{0, {1}}, {3, {1}}}, &error), "a value is too short");
  Check(!library->MakeFunction("k", {{0, {1}}, {3, bytes(1)}, {4, {1}}}, &error), "unknown");
  CheckContains(error, "no function constant 4");
  Check(!library->MakeFunction("q", {{0, {1}}, {3, bytes(1)}}, &error), "no such kernel");
  CheckContains(error, "no kernel q");
}

std::string CompileError(const std::string& source) {
  std::string error;
  Check(Compile(source, {}, &error) == nullptr, "this compiles: " + source);
  return error;
}

TEST(CompileErrors) {
  CheckContains(CompileError("#include <metal_stdlib>\n\nkernel void k() { nonsense(); }"),
                "program_source:3:19: error:");
  CheckContains(CompileError("#include <cmath>\n"), "file not found");
  CheckContains(CompileError("#include <metal_stdlib>\nvoid f() { threadgroup float x[3]; }"),
                "program_source:2: error: only a kernel can declare threadgroup memory");
  CheckContains(CompileError("kernel void k(device float* x) {}"), "has no attribute known here");
  CheckContains(CompileError("#include <metal_stdlib>\n"
                             "kernel void k(constant uint& n [[buffer(0)]]) { n = 1; }"),
                "const");
}

}  // namespace
}  // namespace metal_emulator
