// The int8 matrix product: packed weights, and the engine that quantises the rows of A and multiplies. Every
// output element is a function of its row of A and its column of weights only, and sums are integers: results
// are the same bits for any thread count, batch and (before the epilogue) instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "core/quantise.h"
#include "cpu/gemm.h"
#include "cpu/gemm_int8_kernels.h"

namespace dn::cpu {

// Bytes of a packed (K, N) weight, a multiple of 64. Throws Error(kArgument) above kInt8MostInputs inputs.
int64_t int8_bytes(int64_t K, int64_t N);
// Columns [n_begin, n_begin + plain.N) of a packed weight = plain; n_begin is a multiple of kGemmPanel.
void pack_int8(const Cpu& cpu, void* packed, const Int8Matrix& plain, int64_t n_begin);
// plain = the whole packed weight of its K and N.
void unpack_int8(const Cpu& cpu, const Int8Matrix& plain, const void* packed);
// Column n as fp32: out (K) = q * scale.
void int8_column(const void* packed, int64_t K, int64_t n, float* out);

// p.c = epilogue(quantised A * weight), weight packed with p.K and p.N. A is plain or listed rows; nothing
// accumulates. The first form takes the best kernels of cpu.isa on this machine.
void gemm_int8(const Cpu& cpu, const GemmProduct& p, const void* packed);
void gemm_int8(const Cpu& cpu, const GemmProduct& p, const void* packed, const Int8Kernels& kernels);

// The kernels for an instruction set: the best that it and this machine have. rows: of A; few are not worth
// AMX.
const Int8Kernels& int8_kernels(Isa isa, int64_t rows);
// Everything this machine can run, for tests and benches.
std::vector<const Int8Kernels*> all_int8_kernels();

}  // namespace dn::cpu
