// What native/metal uses of Apple's Foundation, and nothing else, on Apple's own objc/NSObject.h.
// With it a compiler that has macOS's C headers, but none of its frameworks, compiles the backend
// as a Mac would (tests/test_metal_macos.py).
#ifndef METAL_EMULATOR_FOUNDATION_FOUNDATION_H_
#define METAL_EMULATOR_FOUNDATION_FOUNDATION_H_

#include <objc/NSObject.h>
#include <objc/objc.h>

#define NS_ENUM(type, name) \
  enum name : type name;    \
  enum name : type
#define NS_OPTIONS(type, name) \
  enum name : type name;       \
  enum name : type

typedef struct {
  NSUInteger location, length;
} NSRange;

static inline NSRange NSMakeRange(NSUInteger location, NSUInteger length) {
  NSRange range = {location, length};
  return range;
}

@protocol NSCopying
@end

@interface NSString : NSObject <NSCopying>
@property(readonly) const char* UTF8String;
+ (instancetype)stringWithUTF8String:(const char*)text;
@end

@interface NSDictionary : NSObject
+ (instancetype)dictionaryWithObjects:(const id[])objects
                              forKeys:(const id<NSCopying>[])keys
                                count:(NSUInteger)count;
@end

@interface NSError : NSObject
@property(readonly) NSString* localizedDescription;
@end

#endif  // METAL_EMULATOR_FOUNDATION_FOUNDATION_H_
