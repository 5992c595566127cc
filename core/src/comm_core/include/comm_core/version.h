// The version of these headers, for sources that support several versions of comm-core.
#pragma once

// The version of the hook specs, as in a plugin's COMM_HOOK_API.
#define COMM_CORE_HOOK_API_MAJOR 1
#define COMM_CORE_HOOK_API_MINOR 0
