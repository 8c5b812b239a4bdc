// The two custom calls on an Apple GPU: they follow a plan (plan.h) through one command buffer.
//
// JAX's CPU platform shares its memory with the GPU, so operands are wrapped where they lie. The
// handler returns as soon as the command buffer is committed; the buffer's completion handler
// fulfils the future that XLA waits for.
//
// References are counted by hand, through Held: GNUstep's runtime, under which this very file is
// tested on Linux, has no ARC.

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "native/backend.h"
#include "native/calls.h"
#include "native/metal/plan.h"

namespace jax_fused_lora {
namespace {

// shaders/lora.metal and what it includes, made one text by embed.cmake.
const char kShaderSource[] =
#include "shader_source.inc"
    ;

constexpr char kNoDevice[] = "this machine has no Metal device";

// Owns one reference to an Objective-C object.
template <class T>
class Held {
 public:
  Held() = default;
  explicit Held(T owned) : object_(owned) {}
  Held(Held&& other) noexcept : object_(std::exchange(other.object_, nil)) {}
  Held& operator=(Held&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Held() { [object_ release]; }

  T get() const { return object_; }
  explicit operator bool() const { return object_ != nil; }

 private:
  T object_ = nil;
};

NSString* String(const char* text) { return [NSString stringWithUTF8String:text]; }

std::string Describe(NSError* error) {
  const char* text = [[error localizedDescription] UTF8String];
  return text ? text : "unknown error";
}

const char* TypeName(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::BF16:
      return "bfloat";
    case ffi::DataType::F16:
      return "half";
    default:
      return "float";
  }
}

// The device, and what is made once and kept: its queue, a library for each dtype, a pipeline for
// each kernel, dtype and set of constants.
class Gpu {
 public:
  // Null where the machine has no Metal device.
  static Gpu* Instance() {
    // Never destroyed: XLA's threads may still be at work when the process ends.
    static Gpu* const gpu = [] {
      Held<id<MTLDevice>> device(MTLCreateSystemDefaultDevice());
      return device ? new Gpu(std::move(device)) : nullptr;
    }();
    return gpu;
  }

  id<MTLDevice> device() const { return device_.get(); }
  id<MTLCommandQueue> queue() const { return queue_.get(); }

  // Whether the shaders compile here, as they do not before macOS 14; empty, or why not.
  std::string Check() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::string error;
    Library(ffi::DataType::F32, &error);
    return error;
  }

  // The pipeline of a dispatch, or nil with the reason in `error`.
  id<MTLComputePipelineState> Pipeline(const Dispatch& dispatch, ffi::DataType dtype,
                                       std::string* error) {
    // Compiling under the lock lets threads that need the same pipeline wait for it.
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& pipeline = pipelines_[{dispatch.kernel, dtype, dispatch.constants}];
    if (!pipeline) pipeline = MakePipeline(dispatch, dtype, error);
    return pipeline.get();
  }

 private:
  using Key = std::tuple<std::string, ffi::DataType, Constants>;

  explicit Gpu(Held<id<MTLDevice>> device)
      : device_(std::move(device)), queue_([device_.get() newCommandQueue]) {}

  id<MTLLibrary> Library(ffi::DataType dtype, std::string* error) {
    auto& library = libraries_[dtype];
    if (!library) {
      const Held<MTLCompileOptions*> options([[MTLCompileOptions alloc] init]);
      options.get().languageVersion = MTLLanguageVersion3_1;
      options.get().fastMathEnabled = NO;  // infinities and NaN are data
      options.get().preprocessorMacros = @{@"ELEMENT" : String(TypeName(dtype))};
      NSError* problem = nil;
      library = Held<id<MTLLibrary>>([device() newLibraryWithSource:String(kShaderSource)
                                                            options:options.get()
                                                              error:&problem]);
      if (!library) *error = "the shaders do not compile: " + Describe(problem);
    }
    return library.get();
  }

  Held<id<MTLComputePipelineState>> MakePipeline(const Dispatch& dispatch, ffi::DataType dtype,
                                                 std::string* error) {
    id<MTLLibrary> library = Library(dtype, error);
    if (library == nil) return {};
    const Constants& c = dispatch.constants;
    const Held<MTLFunctionConstantValues*> values([[MTLFunctionConstantValues alloc] init]);
    [values.get() setConstantValue:&c.transposed type:MTLDataTypeBool atIndex:0];
    [values.get() setConstantValue:&c.wide_shrink type:MTLDataTypeBool atIndex:1];
    [values.get() setConstantValue:&c.wide_expand type:MTLDataTypeBool atIndex:2];
    [values.get() setConstantValue:&c.has_bias type:MTLDataTypeBool atIndex:3];
    [values.get() setConstantValue:&c.rank_blocks type:MTLDataTypeUInt atIndex:4];
    NSError* problem = nil;
    const Held<id<MTLFunction>> function([library newFunctionWithName:String(dispatch.kernel)
                                                       constantValues:values.get()
                                                                error:&problem]);
    if (!function) {
      *error = std::string("no kernel ") + dispatch.kernel + ": " + Describe(problem);
      return {};
    }
    Held<id<MTLComputePipelineState>> pipeline(
        [device() newComputePipelineStateWithFunction:function.get() error:&problem]);
    if (!pipeline) {
      *error = std::string("no pipeline for ") + dispatch.kernel + ": " + Describe(problem);
    } else if ([pipeline.get() maxTotalThreadsPerThreadgroup] < dispatch.threads) {
      *error = std::string(dispatch.kernel) + " needs " + std::to_string(dispatch.threads) +
               " threads a threadgroup, this GPU gives it " +
               std::to_string([pipeline.get() maxTotalThreadsPerThreadgroup]);
      return {};
    }
    return pipeline;
  }

  Held<id<MTLDevice>> device_;
  Held<id<MTLCommandQueue>> queue_;
  std::mutex mutex_;
  std::map<ffi::DataType, Held<id<MTLLibrary>>> libraries_;
  std::map<Key, Held<id<MTLComputePipelineState>>> pipelines_;
};

// An operand as the GPU sees it, the whole batch of it.
struct Wrapped {
  Held<id<MTLBuffer>> buffer;
  size_t offset = 0;
  bool copied = false;
};

// Metal wraps whole pages only, so the pages that an operand touches are wrapped and the operand
// begins at an offset. What cannot be wrapped is copied.
Wrapped Wrap(id<MTLDevice> device, const Operand& operand) {
  const uintptr_t page = static_cast<uintptr_t>(getpagesize());
  const uintptr_t address = reinterpret_cast<uintptr_t>(operand.data);
  const uintptr_t begin = address / page * page;
  const uintptr_t end = (address + operand.size() + page - 1) / page * page;
  Wrapped wrapped;
  wrapped.offset = address - begin;
  wrapped.buffer =
      Held<id<MTLBuffer>>([device newBufferWithBytesNoCopy:reinterpret_cast<void*>(begin)
                                                    length:end - begin
                                                   options:MTLResourceStorageModeShared
                                               deallocator:nil]);
  if (!wrapped.buffer) {
    wrapped.copied = true;
    wrapped.offset = 0;
    wrapped.buffer = Held<id<MTLBuffer>>(
        operand.result ? [device newBufferWithLength:operand.size()
                                             options:MTLResourceStorageModeShared]
                       : [device newBufferWithBytes:operand.data
                                             length:operand.size()
                                            options:MTLResourceStorageModeShared]);
  }
  // Names the operand inside its pages, for a GPU capture and for the emulator, which lets a
  // kernel touch nothing else of them.
  [wrapped.buffer.get() addDebugMarker:String(operand.name)
                                 range:NSMakeRange(wrapped.offset, operand.size())];
  return wrapped;
}

// What the completion handler needs: the promise, and results to copy back.
struct Pending {
  struct Result {
    Held<id<MTLBuffer>> buffer;
    void* data;
    size_t bytes;
  };
  const char* call;
  ffi::Promise promise;
  std::vector<Result> results;

  void Finish(id<MTLCommandBuffer> commands) {
    if ([commands status] == MTLCommandBufferStatusError) {
      promise.SetError(Failure(call, Describe([commands error])));
      return;
    }
    for (const Result& result : results) {
      std::memcpy(result.data, [result.buffer.get() contents], result.bytes);
    }
    promise.SetAvailable();
  }

  static ffi::Error Failure(const char* call, const std::string& what) {
    return ffi::Error(ffi::ErrorCode::kInternal, std::string(call) + " on Metal: " + what);
  }
};

using AllWrapped = std::array<Wrapped, std::tuple_size<decltype(Plan::operands)>::value>;

// A dispatch of one element of the batch. An encoder has its dispatches run one after the other.
void Encode(id<MTLComputeCommandEncoder> encoder, const Plan& plan, const Dispatch& dispatch,
            id<MTLComputePipelineState> pipeline, const AllWrapped& wrapped, int64_t element) {
  [encoder setComputePipelineState:pipeline];
  [encoder setBytes:&dispatch.sizes length:sizeof(dispatch.sizes) atIndex:0];
  for (size_t i = 0; i < dispatch.arguments.size(); ++i) {
    const int argument = dispatch.arguments[i];
    id<MTLBuffer> buffer = nil;
    size_t offset = 0;
    if (argument != Dispatch::kNone) {
      const Operand& operand = plan.operands[argument];
      buffer = wrapped[argument].buffer.get();
      offset = wrapped[argument].offset +
               static_cast<size_t>(operand.Index(plan.batch, element) * operand.bytes);
    }
    [encoder setBuffer:buffer offset:offset atIndex:i + 1];
  }
  if (dispatch.threadgroup_bytes != 0) {
    [encoder setThreadgroupMemoryLength:dispatch.threadgroup_bytes atIndex:0];
  }
  [encoder dispatchThreadgroups:MTLSizeMake(dispatch.groups[0], dispatch.groups[1], 1)
          threadsPerThreadgroup:MTLSizeMake(dispatch.threads, 1, 1)];
}

// Commits the plan's dispatches in one command buffer. Empty, or why it could not.
std::string Commit(const Plan& plan, ffi::DataType dtype, std::unique_ptr<Pending> pending) {
  Gpu* const gpu = Gpu::Instance();
  if (gpu == nullptr) return kNoDevice;
  std::string error;
  std::array<id<MTLComputePipelineState>, std::tuple_size<decltype(plan.dispatches)>::value>
      pipelines = {};
  for (int i = 0; i < plan.dispatch_count; ++i) {
    pipelines[i] = gpu->Pipeline(plan.dispatches[i], dtype, &error);
    if (pipelines[i] == nil) return error;
  }
  AllWrapped wrapped;
  for (int i = 0; i < plan.operand_count; ++i) {
    const Operand& operand = plan.operands[i];
    if (operand.size() == 0) continue;  // no kernel touches it
    wrapped[i] = Wrap(gpu->device(), operand);
    if (!wrapped[i].buffer) {
      return "no memory for a copy of " + std::string(operand.name) + ", " +
             std::to_string(operand.size()) + " bytes";
    }
  }

  id<MTLCommandBuffer> commands = [gpu->queue() commandBuffer];
  id<MTLComputeCommandEncoder> encoder = [commands computeCommandEncoder];
  if (encoder == nil) return "no command buffer can be had";
  for (int64_t element = 0; element < plan.batch.count; ++element) {
    for (int i = 0; i < plan.dispatch_count; ++i) {
      Encode(encoder, plan, plan.dispatches[i], pipelines[i], wrapped, element);
    }
  }
  [encoder endEncoding];

  for (int i = 0; i < plan.operand_count; ++i) {
    const Operand& operand = plan.operands[i];
    if (operand.result && wrapped[i].copied) {
      pending->results.push_back({std::move(wrapped[i].buffer), operand.data, operand.size()});
    }
  }
  Pending* const owned = pending.release();
  [commands addCompletedHandler:^(id<MTLCommandBuffer> done) {
    @autoreleasepool {
      owned->Finish(done);
      delete owned;
    }
  }];
  [commands commit];
  return "";
}

ffi::Future Failed(ffi::Error error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(std::move(error));
  return future;
}

ffi::Future Launch(const char* call, const Plan& plan, ffi::DataType dtype) {
  ffi::Promise promise;
  ffi::Future future(promise);
  if (plan.dispatch_count == 0) {
    promise.SetAvailable();
    return future;
  }
  std::string error;
  @autoreleasepool {
    error = Commit(plan, dtype, std::unique_ptr<Pending>(new Pending{call, promise, {}}));
  }
  if (!error.empty()) promise.SetError(Pending::Failure(call, error));
  return future;
}

ffi::Future LoraForward(ffi::AnyBuffer x, ffi::AnyBuffer a, ffi::AnyBuffer b,
                        ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> y,
                        ffi::Result<ffi::AnyBuffer> h, ffi::Result<ffi::AnyBuffer> workspace,
                        float scaling, std::string_view form, int64_t slices) {
  ForwardCall call;
  Plan plan;
  ffi::Error error = ReadForward(x, a, b, rest, y, h, workspace, scaling, form, slices, &call);
  if (error.success()) error = PlanForward(call, &plan);
  if (error.failure()) return Failed(std::move(error));
  return Launch("lora_forward", plan, call.dtype);
}

ffi::Future LoraBackward(ffi::AnyBuffer g, ffi::AnyBuffer x, ffi::AnyBuffer a, ffi::AnyBuffer b,
                         ffi::AnyBuffer h, ffi::RemainingArgs rest, ffi::RemainingRets results,
                         float scaling, std::string_view form, std::string_view grads,
                         int64_t slices) {
  BackwardCall call;
  Plan plan;
  ffi::Error error =
      ReadBackward(g, x, a, b, h, rest, results, scaling, form, grads, slices, &call);
  if (error.success()) error = PlanBackward(call, &plan);
  if (error.failure()) return Failed(std::move(error));
  return Launch("lora_backward", plan, call.dtype);
}

XLA_FFI_DEFINE_HANDLER(kForward, LoraForward, BindForward(ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER(kBackward, LoraBackward, BindBackward(ffi::Ffi::Bind()));

}  // namespace

Backend ThisBackend() {
  @autoreleasepool {
    Gpu* const gpu = Gpu::Instance();
    if (gpu == nullptr) throw std::runtime_error(kNoDevice);
    // Compiled when the library is loaded, so that a machine where it fails has another backend
    // take its calls; float32's is the one most calls need anyway.
    const std::string error = gpu->Check();
    if (!error.empty()) throw std::runtime_error(error);
    return {reinterpret_cast<void*>(kForward), reinterpret_cast<void*>(kBackward),
            [[gpu->device() name] UTF8String]};
  }
}

}  // namespace jax_fused_lora
