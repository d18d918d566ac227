// The two structs that torch reads, as this CUDA's headers have them.
#include <string.h>
#include <cuda_runtime_api.h>
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) { memset(p, 0, sizeof *p); strcpy(p->name, NAME);
  p->totalGlobalMem = MEMORY; p->sharedMemPerBlock = 49152; p->regsPerBlock = p->regsPerMultiprocessor = 65536; p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64; p->major = MAJOR; p->minor = MINOR;
  p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535; p->multiProcessorCount = 132; p->l2CacheSize = 52428800;
  p->maxThreadsPerMultiProcessor = 2048; p->sharedMemPerMultiprocessor = SHARED + 1024; p->sharedMemPerBlockOptin = SHARED; return 0; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) { memset(a, 0, sizeof *a); a->maxThreadsPerBlock = 1024;
  a->numRegs = 64; a->binaryVersion = a->ptxVersion = 10 * MAJOR + (MINOR == 9 ? 6 : MINOR); /* torch has no code for 8.9 */ a->maxDynamicSharedSizeBytes = SHARED; return 0; }
