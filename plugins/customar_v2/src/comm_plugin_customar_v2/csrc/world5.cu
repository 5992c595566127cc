#include "instantiate.cuh"

COMM_CUSTOMAR_V2_WORLD(5)
