#include "instantiate.cuh"

COMM_CUSTOMAR_V1_WORLD(2)
