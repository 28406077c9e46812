// cpu/attention_amx.cpp on tiles in plain C++, which have to come first.
// clang-format off
#include "test/amx/tiles.h"
#include "cpu/attention_amx.cpp"
