// For LD_PRELOAD: LibTorch's allocations fail in a process while the file $FAIL_ALLOCATIONS.<its pid> exists, as on a host without memory.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int posix_memalign(void** memory, size_t alignment, size_t bytes) {
  static int (*real)(void**, size_t, size_t);
  if (!real) real = (int (*)(void**, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
  const char* prefix = getenv("FAIL_ALLOCATIONS");
  char file[4096];
  if (prefix) {
    snprintf(file, sizeof file, "%s.%d", prefix, (int)getpid());
    if (access(file, F_OK) == 0) return ENOMEM;
  }
  return real(memory, alignment, bytes);
}
