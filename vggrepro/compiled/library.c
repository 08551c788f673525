// All ops, in one translation unit: see ops.h.

#include "crop.c"
#include "records.c"
