// Counts what happens, and tells it as JSON.

#include "counters.h"

#include <mutex>

#include "runtime.h"

namespace metal_emulator {
namespace {

struct Counters {
  uint64_t command_buffers = 0, dispatches = 0;
  TrafficByName traffic;
  struct OfKernel {
    uint64_t count = 0;
    TrafficByName traffic;
  };
  std::map<std::string, OfKernel> kernels;
};

struct Ledger {
  std::mutex mutex;
  Counters counters;                    // since the last reset
  std::map<std::string, int64_t> live;  // objects of a class
  std::string text;

  // Never destroyed: objects may die after the end of main().
  static Ledger& Get() {
    static Ledger* const ledger = new Ledger;
    return *ledger;
  }
};

std::string Quoted(const std::string& text) {
  std::string result = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    if (static_cast<unsigned char>(c) >= ' ') result += c;
  }
  return result + "\"";
}

std::string Json(uint64_t value) { return std::to_string(value); }
std::string Json(int64_t value) { return std::to_string(value); }
std::string Json(const Traffic& traffic) {
  return "{\"read\": " + Json(traffic.read) + ", \"written\": " + Json(traffic.written) + "}";
}
std::string Json(const Counters::OfKernel& kernel);

template <class T>
std::string Json(const std::map<std::string, T>& map) {
  std::string text;
  for (const auto& [key, value] : map) {
    text += (text.empty() ? "" : ", ") + Quoted(key) + ": " + Json(value);
  }
  return "{" + text + "}";
}

std::string Json(const Counters::OfKernel& kernel) {
  return "{\"count\": " + Json(kernel.count) + ", \"traffic\": " + Json(kernel.traffic) + "}";
}

}  // namespace

void CountDispatch(const std::string& kernel, const TrafficByName& traffic) {
  Ledger& ledger = Ledger::Get();
  const std::lock_guard<std::mutex> lock(ledger.mutex);
  ledger.counters.dispatches += 1;
  Counters::OfKernel& of_kernel = ledger.counters.kernels[kernel];
  of_kernel.count += 1;
  for (const auto& [name, more] : traffic) {
    for (Traffic* sum : {&ledger.counters.traffic[name], &of_kernel.traffic[name]}) {
      sum->read += more.read;
      sum->written += more.written;
    }
  }
}

void CountCommandBuffer() {
  Ledger& ledger = Ledger::Get();
  const std::lock_guard<std::mutex> lock(ledger.mutex);
  ledger.counters.command_buffers += 1;
}

void CountObject(const char* class_name, int delta) {
  Ledger& ledger = Ledger::Get();
  const std::lock_guard<std::mutex> lock(ledger.mutex);
  ledger.live[class_name] += delta;
}

}  // namespace metal_emulator

void metal_emulator_reset_counters() {
  auto& ledger = metal_emulator::Ledger::Get();
  const std::lock_guard<std::mutex> lock(ledger.mutex);
  ledger.counters = {};
}

const char* metal_emulator_counters() {
  using namespace metal_emulator;
  Ledger& ledger = Ledger::Get();
  const std::lock_guard<std::mutex> lock(ledger.mutex);
  const Counters& counters = ledger.counters;
  ledger.text = "{\"command_buffers\": " + Json(counters.command_buffers) +
                ", \"dispatches\": " + Json(counters.dispatches) +
                ", \"traffic\": " + Json(counters.traffic) +
                ", \"kernels\": " + Json(counters.kernels) + ", \"live\": " + Json(ledger.live) +
                "}";
  return ledger.text.c_str();
}
