// cpu/isa.cpp, which finds AMX wherever AVX512_BF16 is: the tiles are in plain C++ (tiles.h).
#define DN_AMX_EMULATOR
#include "cpu/isa.cpp"
