// The classes behind Metal/Metal.h, on runtime.h, with Metal's rules enforced: what Metal's
// validation layer stops at, this stops at, with a message and abort(); what makes a command buffer
// fail on a GPU makes it fail here.
//
// Memory is managed by hand: GNUstep's runtime has no ARC. Methods named new… return owned objects,
// all others autoreleased ones, as in Metal.
//
// Environment:
//   METAL_EMULATOR_NO_WRAP  if set, newBufferWithBytesNoCopy returns nil, as Metal may
//   METAL_EMULATOR_NO_DEVICE  if set, there is no device, as in a virtual machine
//   METAL_EMULATOR_FAIL     every command buffer fails, with this text as its error's description
//   METAL_EMULATOR_SOURCE   a file compiled in place of any source: a shader with a planted error

#import "Metal/Metal.h"

#include <Block.h>
#include <dlfcn.h>
#include <objc/runtime.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "runtime.h"

namespace metal_emulator {

void CountObject(const char* class_name, int delta);
void CountCommandBuffer();

namespace {

constexpr NSUInteger kMaxThreads = 1024;  // of a threadgroup
constexpr NSUInteger kSimdWidth = 32;
constexpr NSUInteger kMaxThreadgroupBytes = 32 << 10;
constexpr NSUInteger kMaxBytes = 4 << 10;  // setBytes:length:atIndex:

void Require(bool holds, SEL method, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "Metal emulator: %s failed assertion: %s\n", sel_getName(method),
               what.c_str());
  std::abort();
}

NSString* String(const std::string& text) {
  // A compiler's words may hold anything.
  NSString* string = [NSString stringWithUTF8String:text.c_str()];
  return string != nil ? string : @"(a message that is not UTF-8)";
}

NSError* Error(NSString* domain, NSInteger code, const std::string& description) {
  return [NSError errorWithDomain:domain
                             code:code
                         userInfo:[NSDictionary dictionaryWithObject:String(description)
                                                              forKey:NSLocalizedDescriptionKey]];
}

std::string Number(NSUInteger number) { return std::to_string(number); }

// A part of a buffer that addDebugMarker:range: named.
struct Marker {
  std::string name;
  NSRange range;
};

struct Command {
  std::shared_ptr<Function> function;
  Dispatch dispatch;
};

}  // namespace
}  // namespace metal_emulator

using metal_emulator::Error;
using metal_emulator::Number;
using metal_emulator::Require;
using metal_emulator::String;

// A copied block keeps the objects that it captured. Debian's blocks runtime leaves that out, so
// these two, which compiled blocks call, stand before it.
extern "C" {
constexpr int kBlockFieldIsObject = 3;  // of the blocks ABI

void _Block_object_assign(void* to, const void* object, const int flags) {
  static const auto next =
      reinterpret_cast<void (*)(void*, const void*, int)>(dlsym(RTLD_NEXT, "_Block_object_assign"));
  if (flags == kBlockFieldIsObject) [static_cast<id>(const_cast<void*>(object)) retain];
  next(to, object, flags);
}

void _Block_object_dispose(const void* object, const int flags) {
  static const auto next =
      reinterpret_cast<void (*)(const void*, int)>(dlsym(RTLD_NEXT, "_Block_object_dispose"));
  if (flags == kBlockFieldIsObject) [static_cast<id>(const_cast<void*>(object)) release];
  next(object, flags);
}
}  // extern "C"

// Counts the living objects of each class.
@interface EmulatedObject : NSObject
+ (const char*)metalName;
@end

@implementation EmulatedObject
+ (const char*)metalName {
  return class_getName(self);
}
- (instancetype)init {
  self = [super init];
  metal_emulator::CountObject([[self class] metalName], 1);
  return self;
}
- (void)dealloc {
  metal_emulator::CountObject([[self class] metalName], -1);
  [super dealloc];
}
@end

// The two classes that Metal.h declares in full have no room for instance variables there, so
// allocating one makes an object of a subclass.

@interface EmulatedCompileOptions : MTLCompileOptions {
  NSDictionary* _preprocessorMacros;
  BOOL _fastMathEnabled;
  MTLLanguageVersion _languageVersion;
}
@end

@implementation MTLCompileOptions
@dynamic preprocessorMacros, fastMathEnabled, languageVersion;
+ (instancetype)allocWithZone:(NSZone*)zone {
  return NSAllocateObject([EmulatedCompileOptions class], 0, zone);
}
@end

@implementation EmulatedCompileOptions
- (instancetype)init {
  self = [super init];
  _fastMathEnabled = YES;
  _languageVersion = MTLLanguageVersion3_1;
  metal_emulator::CountObject("MTLCompileOptions", 1);
  return self;
}
- (void)dealloc {
  [_preprocessorMacros release];
  metal_emulator::CountObject("MTLCompileOptions", -1);
  [super dealloc];
}
- (NSDictionary*)preprocessorMacros {
  return _preprocessorMacros;
}
- (void)setPreprocessorMacros:(NSDictionary*)macros {
  NSDictionary* copy = [macros copy];
  [_preprocessorMacros release];
  _preprocessorMacros = copy;
}
- (BOOL)fastMathEnabled {
  return _fastMathEnabled;
}
- (void)setFastMathEnabled:(BOOL)enabled {
  _fastMathEnabled = enabled;
}
- (MTLLanguageVersion)languageVersion {
  return _languageVersion;
}
- (void)setLanguageVersion:(MTLLanguageVersion)version {
  _languageVersion = version;
}
@end

@interface EmulatedFunctionConstantValues : MTLFunctionConstantValues {
 @public
  std::map<int, std::vector<char>> _values;
}
@end

@implementation MTLFunctionConstantValues
+ (instancetype)allocWithZone:(NSZone*)zone {
  return NSAllocateObject([EmulatedFunctionConstantValues class], 0, zone);
}
- (void)setConstantValue:(const void*)value type:(MTLDataType)type atIndex:(NSUInteger)index {
  [self doesNotRecognizeSelector:_cmd];
}
@end

@implementation EmulatedFunctionConstantValues
- (instancetype)init {
  self = [super init];
  metal_emulator::CountObject("MTLFunctionConstantValues", 1);
  return self;
}
- (void)dealloc {
  metal_emulator::CountObject("MTLFunctionConstantValues", -1);
  [super dealloc];
}
- (void)setConstantValue:(const void*)value type:(MTLDataType)type atIndex:(NSUInteger)index {
  Require(value != nullptr, _cmd, "value must not be nil");
  Require(type == MTLDataTypeBool || type == MTLDataTypeUInt, _cmd,
          "type " + Number(type) + " is neither MTLDataTypeBool nor MTLDataTypeUInt");
  const char* bytes = static_cast<const char*>(value);
  _values[static_cast<int>(index)].assign(bytes, bytes + (type == MTLDataTypeBool ? 1 : 4));
}
@end

@interface EmulatedFunction : EmulatedObject <MTLFunction> {
 @public
  std::shared_ptr<metal_emulator::Function> _function;
}
@end

@implementation EmulatedFunction
+ (const char*)metalName {
  return "MTLFunction";
}
@end

@interface EmulatedLibrary : EmulatedObject <MTLLibrary> {
 @public
  std::shared_ptr<metal_emulator::Library> _library;
}
@end

@implementation EmulatedLibrary
+ (const char*)metalName {
  return "MTLLibrary";
}
- (id<MTLFunction>)newFunctionWithName:(NSString*)name
                        constantValues:(MTLFunctionConstantValues*)constantValues
                                 error:(NSError**)error {
  Require(name != nil, _cmd, "name must not be nil");
  Require(constantValues != nil, _cmd, "constantValues must not be nil");
  std::string message;
  auto* values = static_cast<EmulatedFunctionConstantValues*>(constantValues);
  auto made = _library->MakeFunction([name UTF8String], values->_values, &message);
  if (made == nullptr) {
    // MTLLibraryErrorFunctionNotFound
    if (error != nullptr) *error = Error(@"MTLLibraryErrorDomain", 5, message);
    return nil;
  }
  EmulatedFunction* function = [[EmulatedFunction alloc] init];
  function->_function = std::move(made);
  return function;
}
@end

@interface EmulatedComputePipelineState : EmulatedObject <MTLComputePipelineState> {
 @public
  std::shared_ptr<metal_emulator::Function> _function;
}
@end

@implementation EmulatedComputePipelineState
+ (const char*)metalName {
  return "MTLComputePipelineState";
}
- (NSUInteger)maxTotalThreadsPerThreadgroup {
  return metal_emulator::kMaxThreads;
}
- (NSUInteger)threadExecutionWidth {
  return metal_emulator::kSimdWidth;
}
- (NSUInteger)staticThreadgroupMemoryLength {
  return _function->static_threadgroup_bytes();
}
@end

@interface EmulatedBuffer : EmulatedObject <MTLBuffer> {
 @public
  char* _contents;
  NSUInteger _length;
  void (^_deallocator)(void*, NSUInteger);  // of wrapped memory, may be nil
  BOOL _owned;
  std::vector<metal_emulator::Marker> _markers;
}
@end

@implementation EmulatedBuffer
+ (const char*)metalName {
  return "MTLBuffer";
}
- (instancetype)initWithLength:(NSUInteger)length {
  self = [self init];
  _length = length;
  _owned = YES;
  void* memory = nullptr;
  if (posix_memalign(&memory, getpagesize(), length) != 0) {
    [self release];
    return nil;
  }
  _contents = static_cast<char*>(memory);
  return self;
}
- (void)dealloc {
  if (_owned) std::free(_contents);
  if (_deallocator != nil) {
    _deallocator(_contents, _length);
    Block_release(_deallocator);
  }
  [super dealloc];
}
- (NSUInteger)length {
  return _length;
}
- (void*)contents {
  return _contents;
}
- (void)addDebugMarker:(NSString*)marker range:(NSRange)range {
  Require(marker != nil, _cmd, "marker must not be nil");
  Require(range.location <= _length && range.length <= _length - range.location, _cmd,
          "range of " + Number(range.length) + " bytes at " + Number(range.location) +
              " does not lie within the length " + Number(_length));
  _markers.push_back({[marker UTF8String], range});
}
// A host marks where an operand's bytes lie in the pages that it wrapped. A binding in there may
// touch what is left of the operand and no more, though a GPU would let it touch the whole buffer.
- (metal_emulator::Binding)bindingAtOffset:(NSUInteger)offset {
  metal_emulator::Binding binding;
  binding.name = "buffer";
  binding.data = _contents + offset;
  binding.size = _length - offset;
  for (const metal_emulator::Marker& marker : _markers) {
    if (offset >= marker.range.location && offset < NSMaxRange(marker.range)) {
      binding.name = marker.name;
      binding.size = NSMaxRange(marker.range) - offset;
    }
  }
  return binding;
}
@end

@interface EmulatedCommandBuffer : EmulatedObject <MTLCommandBuffer> {
 @public
  BOOL _encoding;  // an encoder is open
  std::vector<metal_emulator::Command> _commands;
  NSMutableArray* _retained;  // what the commands use

 @private
  std::atomic<NSUInteger> _status;
  NSError* _error;
  std::vector<MTLCommandBufferHandler> _handlers;
}
- (void)execute;
@end

namespace metal_emulator {
namespace {

// One thread that runs committed command buffers one after the other. It starts at the first of
// them and lives as long as the process.
class Gpu {
 public:
  static Gpu& Get() {
    static Gpu* const gpu = new Gpu;
    return *gpu;
  }

  void Enqueue(EmulatedCommandBuffer* buffer) {
    [buffer retain];
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back(buffer);
    }
    arrived_.notify_one();
  }

 private:
  Gpu() { std::thread(&Gpu::Work, this).detach(); }

  void Work() {
    GSRegisterCurrentThread();
    for (;;) {
      @autoreleasepool {
        EmulatedCommandBuffer* buffer = Next();
        [buffer execute];
        [buffer release];
      }
    }
  }

  EmulatedCommandBuffer* Next() {
    std::unique_lock<std::mutex> lock(mutex_);
    arrived_.wait(lock, [this] { return !queue_.empty(); });
    EmulatedCommandBuffer* const buffer = queue_.front();
    queue_.pop_front();
    return buffer;
  }

  std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<EmulatedCommandBuffer*> queue_;
};

}  // namespace
}  // namespace metal_emulator

@interface EmulatedComputeCommandEncoder : EmulatedObject <MTLComputeCommandEncoder> {
  EmulatedCommandBuffer* _commandBuffer;
  EmulatedComputePipelineState* _pipeline;
  metal_emulator::Dispatch _next;  // what is bound so far
  BOOL _ended;
}
@end

@implementation EmulatedComputeCommandEncoder
+ (const char*)metalName {
  return "MTLComputeCommandEncoder";
}
- (instancetype)initWithCommandBuffer:(EmulatedCommandBuffer*)commandBuffer {
  self = [self init];
  _commandBuffer = [commandBuffer retain];
  return self;
}
- (void)dealloc {
  Require(_ended, _cmd, "command encoder released without endEncoding");
  [_commandBuffer release];
  [_pipeline release];
  [super dealloc];
}
- (void)setComputePipelineState:(id<MTLComputePipelineState>)state {
  Require(!_ended, _cmd, "encoding has ended");
  Require(state != nil, _cmd, "state must not be nil");
  [_commandBuffer->_retained addObject:state];
  [state retain];
  [_pipeline release];
  _pipeline = static_cast<EmulatedComputePipelineState*>(state);
}
- (void)setBytes:(const void*)bytes length:(NSUInteger)length atIndex:(NSUInteger)index {
  Require(!_ended, _cmd, "encoding has ended");
  Require(index < metal_emulator::kSlots, _cmd, "index " + Number(index) + " is above 30");
  Require(bytes != nullptr && length > 0, _cmd, "there are no bytes");
  Require(length <= metal_emulator::kMaxBytes, _cmd,
          "length " + Number(length) + " is above 4096; use a buffer");
  metal_emulator::Binding& binding = _next.buffers[index];
  binding = {};
  binding.name = "bytes";
  binding.size = length;
  const char* begin = static_cast<const char*>(bytes);
  binding.bytes.assign(begin, begin + length);
}
- (void)setBuffer:(id<MTLBuffer>)buffer offset:(NSUInteger)offset atIndex:(NSUInteger)index {
  Require(!_ended, _cmd, "encoding has ended");
  Require(index < metal_emulator::kSlots, _cmd, "index " + Number(index) + " is above 30");
  if (buffer == nil) {
    _next.buffers[index] = {};
    return;
  }
  Require(offset < [buffer length], _cmd,
          "offset " + Number(offset) + " is not below the length " + Number([buffer length]));
  [_commandBuffer->_retained addObject:buffer];
  _next.buffers[index] = [static_cast<EmulatedBuffer*>(buffer) bindingAtOffset:offset];
}
- (void)setThreadgroupMemoryLength:(NSUInteger)length atIndex:(NSUInteger)index {
  Require(!_ended, _cmd, "encoding has ended");
  Require(index < metal_emulator::kSlots, _cmd, "index " + Number(index) + " is above 30");
  Require(length % 16 == 0, _cmd, "length " + Number(length) + " is not a multiple of 16");
  _next.threadgroup_lengths[index] = length;
}
- (void)dispatchThreadgroups:(MTLSize)groups threadsPerThreadgroup:(MTLSize)threads {
  Require(!_ended, _cmd, "encoding has ended");
  Require(_pipeline != nil, _cmd, "no compute pipeline state is set");
  Require(groups.width > 0 && groups.height > 0 && groups.depth > 0, _cmd,
          "a side of threadgroupsPerGrid is 0");
  Require(threads.width > 0 && threads.height > 0 && threads.depth > 0, _cmd,
          "a side of threadsPerThreadgroup is 0");
  const NSUInteger total = threads.width * threads.height * threads.depth;
  Require(total <= [_pipeline maxTotalThreadsPerThreadgroup], _cmd,
          Number(total) + " threads in a threadgroup, and the pipeline takes " +
              Number([_pipeline maxTotalThreadsPerThreadgroup]));
  NSUInteger bytes = [_pipeline staticThreadgroupMemoryLength];
  for (size_t length : _next.threadgroup_lengths) bytes += length;
  Require(bytes <= metal_emulator::kMaxThreadgroupBytes, _cmd,
          Number(bytes) + " bytes of threadgroup memory, and the device has " +
              Number(metal_emulator::kMaxThreadgroupBytes));
  const auto u32 = [](NSUInteger side) { return static_cast<uint32_t>(side); };
  _next.groups = {u32(groups.width), u32(groups.height), u32(groups.depth)};
  _next.threads = {u32(threads.width), u32(threads.height), u32(threads.depth)};
  _commandBuffer->_commands.push_back({_pipeline->_function, _next});
}
- (void)endEncoding {
  Require(!_ended, _cmd, "encoding has ended");
  _ended = YES;
  _commandBuffer->_encoding = NO;
}
@end

@implementation EmulatedCommandBuffer
+ (const char*)metalName {
  return "MTLCommandBuffer";
}
- (instancetype)init {
  self = [super init];
  _retained = [[NSMutableArray alloc] init];
  _status = MTLCommandBufferStatusNotEnqueued;
  return self;
}
- (void)dealloc {
  for (MTLCommandBufferHandler handler : _handlers) Block_release(handler);
  [_retained release];
  [_error release];
  [super dealloc];
}
- (MTLCommandBufferStatus)status {
  return static_cast<MTLCommandBufferStatus>(_status.load());
}
- (NSError*)error {
  return _status >= MTLCommandBufferStatusCompleted ? _error : nil;
}
- (id<MTLComputeCommandEncoder>)computeCommandEncoder {
  Require(_status == MTLCommandBufferStatusNotEnqueued, _cmd, "the command buffer is committed");
  Require(!_encoding, _cmd, "another encoder is still encoding to this command buffer");
  _encoding = YES;
  return [[[EmulatedComputeCommandEncoder alloc] initWithCommandBuffer:self] autorelease];
}
- (void)addCompletedHandler:(MTLCommandBufferHandler)block {
  Require(_status == MTLCommandBufferStatusNotEnqueued, _cmd,
          "completed handler provided after commit call");
  Require(block != nil, _cmd, "block must not be nil");
  _handlers.push_back(Block_copy(block));
}
- (void)commit {
  Require(_status == MTLCommandBufferStatusNotEnqueued, _cmd,
          "commit an already committed command buffer");
  Require(!_encoding, _cmd, "commit command buffer with uncommitted encoder");
  _status = MTLCommandBufferStatusCommitted;
  metal_emulator::CountCommandBuffer();
  metal_emulator::Gpu::Get().Enqueue(self);
}
- (void)execute {
  _status = MTLCommandBufferStatusScheduled;
  const char* planted = std::getenv("METAL_EMULATOR_FAIL");
  std::string message = planted != nullptr ? planted : "";
  for (const metal_emulator::Command& command : _commands) {
    if (!message.empty()) break;
    message = command.function->Run(command.dispatch);
  }
  if (!message.empty()) {
    // MTLCommandBufferErrorInternal
    _error = [Error(@"MTLCommandBufferErrorDomain", 1, message) retain];
  }
  _status = message.empty() ? MTLCommandBufferStatusCompleted : MTLCommandBufferStatusError;
  // A handler may let the process end or look at the counts, so all else is let go of before it.
  _commands.clear();
  [_retained removeAllObjects];
  for (MTLCommandBufferHandler handler : _handlers) handler(self);
  for (MTLCommandBufferHandler handler : _handlers) Block_release(handler);
  _handlers.clear();
}
@end

@interface EmulatedCommandQueue : EmulatedObject <MTLCommandQueue>
@end

@implementation EmulatedCommandQueue
+ (const char*)metalName {
  return "MTLCommandQueue";
}
- (id<MTLCommandBuffer>)commandBuffer {
  return [[[EmulatedCommandBuffer alloc] init] autorelease];
}
@end

@interface EmulatedDevice : EmulatedObject <MTLDevice>
@end

@implementation EmulatedDevice
+ (const char*)metalName {
  return "MTLDevice";
}
- (NSString*)name {
  return @"Metal emulator";
}
- (id<MTLCommandQueue>)newCommandQueue {
  return [[EmulatedCommandQueue alloc] init];
}
- (id<MTLLibrary>)newLibraryWithSource:(NSString*)source
                               options:(MTLCompileOptions*)options
                                 error:(NSError**)error {
  Require(source != nil, _cmd, "source must not be nil");
  std::string text = [source UTF8String], message;
  if (const char* path = std::getenv("METAL_EMULATOR_SOURCE")) {
    std::ifstream file(path);
    Require(file.good(), _cmd, std::string("cannot read METAL_EMULATOR_SOURCE ") + path);
    text.assign(std::istreambuf_iterator<char>(file), {});
  }
  std::map<std::string, std::string> macros;
  NSDictionary* given = [options preprocessorMacros];
  for (NSString* name in given) {
    macros[[name UTF8String]] = [[[given objectForKey:name] description] UTF8String];
  }
  auto made = metal_emulator::Compile(text, macros, &message);
  if (made == nullptr) {
    // MTLLibraryErrorCompileFailure
    if (error != nullptr) *error = Error(@"MTLLibraryErrorDomain", 3, message);
    return nil;
  }
  EmulatedLibrary* library = [[EmulatedLibrary alloc] init];
  library->_library = std::move(made);
  return library;
}
- (id<MTLComputePipelineState>)newComputePipelineStateWithFunction:(id<MTLFunction>)function
                                                             error:(NSError**)error {
  Require(function != nil, _cmd, "function must not be nil");
  auto& made = static_cast<EmulatedFunction*>(function)->_function;
  if (made->static_threadgroup_bytes() > metal_emulator::kMaxThreadgroupBytes) {
    if (error != nullptr) {
      *error = Error(@"AGXMetal", 3,
                     "threadgroup memory of " + Number(made->static_threadgroup_bytes()) +
                         " bytes exceeds the maximum of " +
                         Number(metal_emulator::kMaxThreadgroupBytes));
    }
    return nil;
  }
  EmulatedComputePipelineState* state = [[EmulatedComputePipelineState alloc] init];
  state->_function = made;
  return state;
}
- (id<MTLBuffer>)newBufferWithLength:(NSUInteger)length options:(MTLResourceOptions)options {
  if (length == 0) return nil;
  EmulatedBuffer* buffer = [[EmulatedBuffer alloc] initWithLength:length];
  // NaN in every floating point type: Metal does not promise zeros.
  if (buffer != nil) std::memset(buffer->_contents, 0xff, length);
  return buffer;
}
- (id<MTLBuffer>)newBufferWithBytes:(const void*)pointer
                             length:(NSUInteger)length
                            options:(MTLResourceOptions)options {
  if (pointer == nullptr || length == 0) return nil;
  EmulatedBuffer* buffer = [[EmulatedBuffer alloc] initWithLength:length];
  if (buffer != nil) std::memcpy(buffer->_contents, pointer, length);
  return buffer;
}
- (id<MTLBuffer>)newBufferWithBytesNoCopy:(void*)pointer
                                   length:(NSUInteger)length
                                  options:(MTLResourceOptions)options
                              deallocator:(void (^)(void*, NSUInteger))deallocator {
  const NSUInteger page = getpagesize();
  const bool pages = pointer != nullptr && length > 0 && length % page == 0 &&
                     reinterpret_cast<uintptr_t>(pointer) % page == 0;
  if (!pages || std::getenv("METAL_EMULATOR_NO_WRAP") != nullptr) return nil;
  EmulatedBuffer* buffer = [[EmulatedBuffer alloc] init];
  buffer->_contents = static_cast<char*>(pointer);
  buffer->_length = length;
  if (deallocator != nil) buffer->_deallocator = Block_copy(deallocator);
  return buffer;
}
@end

id<MTLDevice> MTLCreateSystemDefaultDevice(void) {
  return std::getenv("METAL_EMULATOR_NO_DEVICE") ? nil : [[EmulatedDevice alloc] init];
}
