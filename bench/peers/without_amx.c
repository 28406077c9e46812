/* LD_PRELOAD library for a comparison on the other instructions of a machine that has AMX: Linux refuses this process the state
 * of its tiles, which engines ask for before they use them (onnxruntime and ggml through syscall() of the C library). Linux on
 * x86-64. Built by the benchmark: cc -O2 -shared -fPIC without_amx.c -ldl */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <sys/syscall.h>

/* asm/prctl.h, which older headers lack. */
enum { kRequestPermission = 0x1023 };

long syscall(long number, ...) {
  static long (*real)(long, ...);
  long a[6];
  va_list list;
  va_start(list, number);
  for (int i = 0; i < 6; ++i) a[i] = va_arg(list, long);
  va_end(list);
  if (number == SYS_arch_prctl && a[0] == kRequestPermission) {
    errno = EPERM;
    return -1;
  }
  if (!real) real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
  return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
