"""Native code: compilers, the user's cache of what they built, and the build hook for wheels."""
