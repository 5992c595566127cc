// Which comm-core these headers come from, for sources that serve several.
#pragma once

// The version of the hook specs, as in a plugin's COMM_HOOK_API.
#define COMM_CORE_HOOK_API_MAJOR 1
#define COMM_CORE_HOOK_API_MINOR 0
