// GNUstep's headers ask for this file where blocks are on, and GCC's Objective-C runtime has none.
#include <Block.h>
