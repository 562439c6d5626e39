// Warpgroup products: wgmma.mma_async m64nNk16 of bf16 or fp16 with fp32 sums. Sections of the PTX ISA manual: "Asynchronous
// Warpgroup Level Matrix Multiply-Accumulate Operation using wgmma.mma_async instruction" and those after it.
//
// Fragments, g = lane / 4, t = lane % 4, w = warp of its warpgroup:
//   sums      register 4 j + 2 h + c  is row 16 w + g + 8 h, column 8 j + 2 t + c
//   left      register 4 i + 2 b + h  holds row 16 w + g + 8 h, columns 16 i + 8 b + 2 t (low half) and + 1, of k step i
// So the left operand's register 4 i + 2 b + h takes the sums' registers 8 i + 4 b + 2 h and + 1: probabilities are re-packed
// in the thread that has them.
#pragma once

#include "ptx.cuh"
#include "stream.h"

namespace vmf::cuda {

// "wgmma.fence": before the first product, and wherever registers of one were written otherwise.
VMF_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// "wgmma.commit_group"
VMF_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Keeps the compiler from moving uses of registers of a product across this point: it does not know that they are written
// later.
template <int N>
VMF_DEVICE void pin(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// "wgmma.wait_group": until at most PENDING of the groups committed last are unfinished; `registers` are then the result.
template <int PENDING, int N>
VMF_DEVICE void await_products(float (&registers)[N]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  pin(registers);
}

// Two probabilities rounded to the products' element, the first in the low half.
template <Element ELEMENT>
VMF_DEVICE uint32_t rounded_pair(float low, float high) {
  uint32_t pair;
  if constexpr (ELEMENT == Element::bf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// Operand lists: inline assembly wants every register by name.
// clang-format off
#define VMF_NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define VMF_NAMES_64 \
  VMF_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define VMF_NAMES_96 \
  VMF_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define VMF_NAMES_128 \
  VMF_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define VMF_SUMS_8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
    "+f"(d[i + 6]), "+f"(d[i + 7])
#define VMF_SUMS_32(d, i) VMF_SUMS_8(d, i), VMF_SUMS_8(d, i + 8), VMF_SUMS_8(d, i + 16), VMF_SUMS_8(d, i + 24)
#define VMF_SUMS_64(d) VMF_SUMS_32(d, 0), VMF_SUMS_32(d, 32)
#define VMF_SUMS_96(d) VMF_SUMS_64(d), VMF_SUMS_32(d, 64)
#define VMF_SUMS_128(d) VMF_SUMS_96(d), VMF_SUMS_32(d, 96)

// clang-format on

// Both operands in shared memory, both K-major: sums [64, COLUMNS] = left [64, 16] right [COLUMNS, 16]^T, added to what is
// there unless `first`. LEFT, RIGHT, ADD are the operands' numbers, after the sums'.
#define VMF_SHARED_PRODUCT(COLUMNS, TYPE, NAMES, LEFT, RIGHT, ADD, ...)                                                       \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE \
               "." TYPE " {" NAMES "}, %" LEFT ", %" RIGHT ", add, 1, 1, 0, 0;\n}"                                            \
               : __VA_ARGS__                                                                                                  \
               : "l"(left), "l"(right), "r"(int(!first)))

// The left operand in registers, the right MN-major: sums [64, COLUMNS] += left [64, 16] right [16, COLUMNS].
#define VMF_REGISTER_PRODUCT(COLUMNS, TYPE, NAMES, A0, A1, A2, A3, RIGHT, ...)                                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" COLUMNS "k16.f32." TYPE "." TYPE " {" NAMES "}, {%" A0 ", %" A1 ", %" A2 \
               ", %" A3 "}, %" RIGHT ", 1, 1, 1, 1;"                                                                        \
               : __VA_ARGS__                                                                                                \
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right))

#define VMF_BY_ELEMENT(PRODUCT, COLUMNS, ...) \
  if constexpr (ELEMENT == Element::bf16) {   \
    PRODUCT(COLUMNS, "bf16", __VA_ARGS__);    \
  } else {                                    \
    PRODUCT(COLUMNS, "f16", __VA_ARGS__);     \
  }

// One step of k. SUMS registers a thread: COLUMNS / 2.
template <Element ELEMENT, int SUMS>
VMF_DEVICE void multiply_shared(float (&sums)[SUMS], uint64_t left, uint64_t right, bool first) {
  static_assert(SUMS == 32 || SUMS == 64);
  if constexpr (SUMS == 32) {
    VMF_BY_ELEMENT(VMF_SHARED_PRODUCT, "64", VMF_NAMES_32, "32", "33", "34", VMF_SUMS_32(sums, 0))
  } else {
    VMF_BY_ELEMENT(VMF_SHARED_PRODUCT, "128", VMF_NAMES_64, "64", "65", "66", VMF_SUMS_64(sums))
  }
}

template <Element ELEMENT, int SUMS>
VMF_DEVICE void multiply_registers(float (&sums)[SUMS], const uint32_t* left, uint64_t right) {
  static_assert(SUMS == 32 || SUMS == 64 || SUMS == 96 || SUMS == 128);
  if constexpr (SUMS == 32) {
    VMF_BY_ELEMENT(VMF_REGISTER_PRODUCT, "64", VMF_NAMES_32, "32", "33", "34", "35", "36", VMF_SUMS_32(sums, 0))
  } else if constexpr (SUMS == 64) {
    VMF_BY_ELEMENT(VMF_REGISTER_PRODUCT, "128", VMF_NAMES_64, "64", "65", "66", "67", "68", VMF_SUMS_64(sums))
  } else if constexpr (SUMS == 96) {
    VMF_BY_ELEMENT(VMF_REGISTER_PRODUCT, "192", VMF_NAMES_96, "96", "97", "98", "99", "100", VMF_SUMS_96(sums))
  } else {
    VMF_BY_ELEMENT(VMF_REGISTER_PRODUCT, "256", VMF_NAMES_128, "128", "129", "130", "131", "132", VMF_SUMS_128(sums))
  }
}

#undef VMF_BY_ELEMENT
#undef VMF_REGISTER_PRODUCT
#undef VMF_SHARED_PRODUCT

}  // namespace vmf::cuda
