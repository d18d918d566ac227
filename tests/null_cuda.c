// Memory is real (and counted), kernels do nothing. NAME, MAJOR, MINOR, MEMORY, SHARED and CONTEXT come from null_cuda.py.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <stdint.h>
#include <sys/mman.h>
typedef unsigned long long u64; typedef struct { unsigned x, y, z; } dim3;
static size_t used; static int lock; static struct { char *p; size_t n; int device; } B[1 << 16]; static int nB;
#define LOCKED(x) do { while (__sync_lock_test_and_set(&lock, 1)); x; __sync_lock_release(&lock); } while (0)
static int find(char *q) { for (int i = nB; i--;) if (B[i].n && q >= B[i].p && q < B[i].p + B[i].n) return i; return -1; }
static void add(void *p, size_t n, int device) { LOCKED(B[nB].p = p; B[nB].n = n; B[nB++].device = device); }
static int on_device(void *p) { int i; LOCKED(i = find(p)); return i >= 0 && B[i].device; }
int cudaMalloc(void **p, size_t n) { n = (n + 0x1fffff) & ~0x1fffffull; if (used + n + CONTEXT > MEMORY) return *p = 0, 2;
  *p = mmap(0, n, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); used += n; add(*p, n, 1); return 0; }
int cudaFree(void *p) { int i; LOCKED(i = p ? find(p) : -1; if (i >= 0) { munmap(p, B[i].n); used -= B[i].n; B[i].n = 0; }); return 0; }
int cudaHostAlloc(void **p, size_t n, int f) { *p = aligned_alloc(4096, (n + 4095) & ~4095ull); add(*p, n, 0); return 0; }
int cudaFreeHost(void *p) { int i; LOCKED(i = find(p); if (i >= 0) B[i].n = 0); free(p); return 0; }
int cudaMemGetInfo(size_t *f, size_t *t) { *t = MEMORY; *f = MEMORY - used - CONTEXT; return 0; }
int cudaPointerGetAttributes(int *a, char *p) { int i; LOCKED(i = find(p)); memset(a, 0, 24); a[0] = i < 0 ? 0 : B[i].device ? 2 : 1; *(void **)(a + 2) = *(void **)(a + 4) = p; return 0; }
int cudaMemcpy(void *d, void *s, size_t n, int k) { if (!on_device(d) || !on_device(s)) memmove(d, s, n); return 0; }
int cudaMemcpyAsync(void *d, void *s, size_t n, int k, void *st) { return cudaMemcpy(d, s, n, k); }
int cuPointerGetAttribute(u64 *v, int a, char *p) { int i; LOCKED(i = find(p)); return i < 0 ? 1 : (*v = (u64)p, 0); }
int cudaGetSymbolAddress(void **p, void *y) { static char z[1 << 16]; *p = z; return 0; }
static int attribute(int a) { switch (a) { case 1: case 2: case 3: return 1024; case 4: return 64; case 5: return 2147483647;
  case 6: case 7: return 65535; case 8: return 49152; case 9: return 65536; case 10: return 32; case 12: case 82: return 65536;
  case 13: return 1980000; case 16: return 132; case 36: return 2619000; case 37: return 5120; case 38: return 52428800;
  case 39: return 2048; case 75: return MAJOR; case 76: return MINOR; case 81: return SHARED + 1024; case 97: return SHARED; } return 0; }
int cudaDeviceGetAttribute(int *v, int a, int d) { *v = attribute(a); return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = attribute(a); return 0; }
int cudaSetDevice(int d) { if (d) fprintf(stderr, "cudaSetDevice(%d)\n", d); return d ? 101 : 0; }
int cudaDeviceGetStreamPriorityRange(int *a, int *b) { *a = 0; *b = -5; return 0; }
int cuDevicePrimaryCtxGetState(int d, int *f, int *a) { *a = 1; return 0; }
int cuCtxGetLimit(size_t *v, int l) { *v = 1 << 20; return 0; }
int cuGetErrorString(int e, char **s) { *s = "error of the null driver"; return 0; }
char *cudaGetErrorString(int e) { return e == 2 ? "out of memory" : "error of the null runtime"; }
char *cudaGetErrorName(int e) { return "cudaErrorNull"; }
int cudaEventElapsedTime(float *t, void *a, void *b) { *t = 1; return 0; }
void **__cudaRegisterFatBinary(void *b) { static void *h; return &h; }
int __cudaGetKernel(void **k, void *f) { *k = f; return 0; }
static int launch(dim3 g, dim3 b, size_t m) {
  int wrong = g.y > 65535 || g.z > 65535 || !g.x || !g.y || !g.z || b.x * b.y * b.z > 1024 || m > SHARED;
  if (wrong) fprintf(stderr, "launch of %u x %u x %u blocks of %u x %u x %u threads, %zu bytes of shared memory\n", g.x, g.y, g.z, b.x, b.y, b.z, m);
  return wrong ? 9 : 0; }
int __cudaLaunchKernel(void *k, dim3 g, dim3 b, void **a, size_t m, void *s) { return launch(g, b, m); }
int cudaLaunchKernel(void *k, dim3 g, dim3 b, void **a, size_t m, void *s) { return launch(g, b, m); }
int cudaLaunchKernelExC(unsigned *c, void *f, void **a) { return launch(*(dim3 *)c, *(dim3 *)(c + 3), *(size_t *)(c + 6)); }
int cuLaunchKernelEx(unsigned *c, void *f, void **p, void **e) { return launch(*(dim3 *)c, *(dim3 *)(c + 3), c[6]); }
int cuLaunchKernel(void *f, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b, unsigned c, unsigned m, void *s, void **p, void **e) { return launch((dim3){x, y, z}, (dim3){a, b, c}, m); }
int cuLaunchCooperativeKernel() { return 0; }
static __thread struct { dim3 g, b; size_t m; void *s; } P;
int __cudaPushCallConfiguration(dim3 g, dim3 b, size_t m, void *s) { P.g = g; P.b = b; P.m = m; P.s = s; return 0; }
int __cudaPopCallConfiguration(dim3 *g, dim3 *b, size_t *m, void **s) { *g = P.g; *b = P.b; *m = P.m; *s = P.s; return 0; }
int cuFuncGetAttribute(int *v, int a, void *f) { *v = a == 0 ? 1024 : a == 4 ? 32 : 0; return 0; }
size_t cublasLtGetVersion() { return 130100; }
int cublasLtMatmulAlgoGetHeuristic(void *h, void *d, void *a, void *b, void *c, void *e, void *p, int n, void *r, int *k) { memset(r, 0, 64); *k = 1; return 0; }
int cudaGetDriverEntryPointByVersion(char *s, void **f, unsigned v, u64 fl, int *q) { *f = dlsym(RTLD_DEFAULT, s); if (!*f) *f = cuLaunchCooperativeKernel; if (q) *q = 0; return 0; }
static void *handle() { static uintptr_t n = 0x1000; return (void *)__sync_add_and_fetch(&n, 16); }

// What succeeds and does nothing, what gives a number, what gives a handle
#define ZERO(name) int name() { return 0; }
#define FIRST(name, value) int name(int *r) { *r = value; return 0; }
#define SECOND(name, value) int name(void *a, int *r) { *r = value; return 0; }
#define HANDLE(name) int name(void **r) { *r = handle(); return 0; }
ZERO(cudaHostRegister) ZERO(cudaHostUnregister) ZERO(cudaMemset) ZERO(cudaMemsetAsync) ZERO(cudaMemcpyToSymbol)
ZERO(cudaDeviceSynchronize) ZERO(cudaGetLastError) ZERO(cudaPeekAtLastError) ZERO(cudaStreamDestroy)
ZERO(cudaStreamQuery) ZERO(cudaStreamSynchronize) ZERO(cudaStreamWaitEvent) ZERO(cudaThreadExchangeStreamCaptureMode)
ZERO(cudaEventDestroy) ZERO(cudaEventQuery) ZERO(cudaEventRecord) ZERO(cudaEventRecordWithFlags)
ZERO(cudaEventSynchronize) ZERO(cudaFuncSetAttribute) ZERO(__cudaRegisterFatBinaryEnd) ZERO(__cudaUnregisterFatBinary)
ZERO(__cudaRegisterVar) ZERO(__cudaRegisterFunction) ZERO(cuInit) ZERO(cuCtxSetCurrent) ZERO(cuCtxPushCurrent)
ZERO(cuCtxSetLimit) ZERO(cuFuncSetCacheConfig) ZERO(cuLinkAddData_v2) ZERO(cuLinkComplete) ZERO(cuLinkCreate_v2)
ZERO(cuModuleUnload) ZERO(cuTensorMapEncodeTiled) ZERO(cuFuncSetAttribute) ZERO(cublasDestroy_v2)
ZERO(cublasSetMathMode) ZERO(cublasSetPointerMode_v2) ZERO(cublasSetStream_v2) ZERO(cublasSetWorkspace_v2)
ZERO(cublasGemmEx) ZERO(cublasGemmStridedBatchedEx) ZERO(cublasSgemm_v2) ZERO(cublasSgemmStridedBatched)
ZERO(cublasLtMatmulDescDestroy) ZERO(cublasLtMatmulDescSetAttribute) ZERO(cublasLtMatmulPreferenceDestroy)
ZERO(cublasLtMatmulPreferenceSetAttribute) ZERO(cublasLtMatrixLayoutDestroy) ZERO(cublasLtMatrixLayoutSetAttribute)
ZERO(cublasLtMatmul) SECOND(cudaStreamIsCapturing, 0) SECOND(cudaStreamGetCaptureInfo, 0) FIRST(cudaGetDeviceCount, 1)
FIRST(cudaGetDevice, 0) FIRST(cudaDriverGetVersion, 13000) FIRST(cudaRuntimeGetVersion, 13000)
FIRST(cudaDeviceCanAccessPeer, 0) FIRST(cuDeviceGet, 0) SECOND(cublasGetMathMode, 0)
SECOND(cublasGetPointerMode_v2, 0) FIRST(cuOccupancyMaxActiveBlocksPerMultiprocessor, 2)
FIRST(cuOccupancyMaxActiveClusters, 1) FIRST(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, 2)
HANDLE(cudaStreamCreate) HANDLE(cudaStreamCreateWithFlags) HANDLE(cudaStreamCreateWithPriority)
HANDLE(cudaEventCreate) HANDLE(cudaEventCreateWithFlags) HANDLE(cublasCreate_v2) HANDLE(cublasLtCreate)
HANDLE(cublasLtMatmulDescCreate) HANDLE(cublasLtMatmulPreferenceCreate) HANDLE(cublasLtMatrixLayoutCreate)
HANDLE(cuModuleLoad) HANDLE(cuModuleLoadData) HANDLE(cuModuleLoadDataEx) HANDLE(cuCtxGetCurrent)
HANDLE(cuCtxPopCurrent) HANDLE(cuDevicePrimaryCtxRetain) HANDLE(cuModuleGetFunction)
