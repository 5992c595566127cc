// The inputs of captured calls in its peers' memory: for `comm_core.registration`.
#include <comm_core/peer_memory_functions.h>

TVM_FFI_DLL_EXPORT_TYPED_FUNC(peer_memory, comm_core::peer_memory);
