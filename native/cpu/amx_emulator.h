// For tests on a machine without AMX: the instructions of amx.h, carried out when the CPU, which
// does not know them, asks what to do.
#ifndef JAX_FUSED_LORA_NATIVE_CPU_AMX_EMULATOR_H_
#define JAX_FUSED_LORA_NATIVE_CPU_AMX_EMULATOR_H_

#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace jax_fused_lora {

class AmxEmulator {
 public:
  static void Install() {
    struct sigaction action = {};
    action.sa_sigaction = &Handle;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, nullptr);
  }

 private:
  struct Tile {
    unsigned char rows, bytes;
    float numbers[16][16];
  };

  static void Handle(int, siginfo_t*, void* context) {
    greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const auto* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
    registers[REG_RIP] += Run(code, registers);
  }

  // Carries one instruction out and returns its length: C4, two bytes of VEX prefix, the operation,
  // ModRM, and an address (Intel's manual, volume 2, "Intel AMX instructions").
  static int Run(const uint8_t* code, const greg_t* registers) {
    static Tile tiles[8];
    const bool vex = code[0] == 0xC4 && (code[1] & 0x1F) == 2;
    const int operation = vex ? code[3] << 8 | (code[2] & 3) : 0;  // with the implied prefix
    const int modrm = code[4], reg = modrm >> 3 & 7, rm = modrm & 7;
    const bool memory = modrm >> 6 != 3;
    Address at = {};
    if (memory) at = Decode(code, registers);
    switch (operation) {
      case 0x4900:
        if (memory) {  // LDTILECFG
          for (int i = 0; i < 8; ++i) {
            std::memset(&tiles[i], 0, sizeof tiles[i]);
            tiles[i].rows = at.base[48 + i], tiles[i].bytes = at.base[16 + 2 * i];
            if ((tiles[i].rows == 0) != (tiles[i].bytes == 0)) Fail("a tile of no rows or columns");
          }
          return at.length;
        }
        std::memset(tiles, 0, sizeof tiles);  // TILERELEASE
        return 5;
      case 0x4903:  // TILEZERO
        std::memset(tiles[reg].numbers, 0, sizeof tiles[reg].numbers);
        return 5;
      case 0x4B03:  // TILELOADD
      case 0x4B02:  // TILESTORED
        if (tiles[reg].rows == 0) Fail("a tile without a shape");
        for (int i = 0; i < tiles[reg].rows; ++i) {
          unsigned char* row = at.base + i * at.stride;
          if (operation == 0x4B03) std::memcpy(tiles[reg].numbers[i], row, tiles[reg].bytes);
          if (operation == 0x4B02) std::memcpy(row, tiles[reg].numbers[i], tiles[reg].bytes);
        }
        return at.length;
      case 0x5C02:  // TDPBF16PS
        Multiply(tiles[rm], tiles[~code[2] >> 3 & 7], &tiles[reg]);
        return 5;
      default:
        Fail("an instruction that is not of AMX");
    }
  }

  static void Multiply(const Tile& x, const Tile& w, Tile* sums) {
    const int columns = sums->bytes / 4, steps = x.bytes / 4;
    if (x.rows != sums->rows || w.bytes != sums->bytes || w.rows != steps) Fail("shapes differ");
    for (int i = 0; i < x.rows; ++i) {
      for (int s = 0; s < steps; ++s) {
        for (int j = 0; j < columns; ++j) {
          for (int half = 0; half < 2; ++half) {
            sums->numbers[i][j] += Half(x.numbers[i][s], half) * Half(w.numbers[s][j], half);
          }
        }
      }
    }
  }
  static float Half(float pair, int half) {
    uint32_t bits;
    std::memcpy(&bits, &pair, sizeof bits);
    bits = half == 0 ? bits << 16 : bits & 0xFFFF0000;
    std::memcpy(&pair, &bits, sizeof bits);
    return pair;
  }

  struct Address {
    unsigned char* base;
    int64_t stride;
    int length;  // of the instruction
  };
  // A base and a displacement, and the stride in place of an index.
  static Address Decode(const uint8_t* code, const greg_t* registers) {
    static constexpr int kRegisters[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                         REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                         REG_R12, REG_R13, REG_R14, REG_R15};
    const int mode = code[4] >> 6, rm = code[4] & 7;
    const int more_base = code[1] & 0x20 ? 0 : 8, more_index = code[1] & 0x40 ? 0 : 8;
    int length = 5, base = rm, scale = 0;
    int64_t stride = 0;
    if (rm == 4) {
      const int sib = code[length++];
      base = sib & 7, scale = sib >> 6;
      const int index = (sib >> 3 & 7) + more_index;
      if (index != 4) stride = registers[kRegisters[index]] << scale;
    }
    if (mode == 0 && base == 5) Fail("an address without a base");
    int64_t address = registers[kRegisters[base + more_base]];
    if (mode == 1) {
      address += static_cast<int8_t>(code[length]);
      length += 1;
    } else if (mode == 2) {
      int32_t far;
      std::memcpy(&far, code + length, sizeof far);
      address += far;
      length += 4;
    }
    return {reinterpret_cast<unsigned char*>(address), stride, length};
  }

  [[noreturn]] static void Fail(const char* what) {
    std::printf("AMX: %s\n", what);
    std::abort();
  }
};

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CPU_AMX_EMULATOR_H_
